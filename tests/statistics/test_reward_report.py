"""What a report says of ties does not depend on the order of rows."""

from __future__ import annotations

from itertools import permutations

import pytest

from steersman.statistics.reward_report import ranking_report


def best_found(scores, ranks):
    return ranking_report(scores, ranks, [[1] * len(s) for s in scores], draws=5).numbers["best_found"]


def test_the_best_found_among_tied_scores_is_shared():
    for ranks in permutations([0, 1, 2, 3]):
        assert best_found([[0.5] * 4], [ranks]).value == 0.25
        assert best_found([[0.5, 0.5, 0.1, 0.1]], [ranks]).value == pytest.approx(0.5 * (0 in ranks[:2]))
    assert best_found([[2.0, 2.0, 1.0], [3.0, 1.0, 0.0]], [[0, 0, 1], [0, 1, 2]]).value == 1.0
    told = best_found([[0.0] * 4] * 200, [[0, 1, 2, 3]] * 200)
    assert told.low < told.value == 0.25 < told.high
    assert told.n == 200
