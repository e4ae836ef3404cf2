"""Draws of whole clusters, beside a loop written out."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.statistics.estimates import bootstrap, mean
from steersman.statistics.intervals import resampled_sums, resamples


@pytest.mark.parametrize("clusters", [[0, 1, 2, 3], [7, 2, 7, 2, 5], ["b", "a", "b"]])
def test_draws_are_whole_clusters_with_replacement(clusters):
    rows = np.array(clusters)
    members = [np.flatnonzero(rows == c) for c in np.unique(rows)]
    rng = np.random.default_rng(3)
    drawn = list(resamples(rows, 20, seed=3))
    for one in drawn:
        expected = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        assert one.tolist() == expected.tolist()
    assert len(drawn) == 20


def test_nothing_can_be_drawn_of_nothing_and_one_cluster_has_no_interval():
    assert list(resamples(np.array([]), 5)) == []
    assert list(resamples(np.array(["b", "b"]), 5)) == []
    x = np.array([1.0, 2.0, 6.0])
    assert bootstrap(mean, [x], clusters=np.array([1, 1, 1])).low == -np.inf
    assert str(bootstrap(mean, [x[:1]])) == "1.000 (no interval)"
    assert bootstrap(mean, [x[:1]]).plain() == {"value": 1.0, "low": None, "high": None, "n": 1}
    assert bootstrap(mean, [x[:0]]).n == 0
    found = bootstrap(mean, [x])
    assert found.low < found.value == 3.0 < found.high


def test_draws_that_are_all_the_same_say_nothing():
    assert str(bootstrap(mean, [np.ones(20)])) == "1.000 (no interval)"
    assert bootstrap(mean, [np.array([1.0, 0.0, 1.0, 0.0])], clusters=np.array([0, 0, 1, 1])).low == -np.inf


def test_sums_are_those_of_the_rows_drawn():
    rows = np.random.default_rng(0).normal(size=(7, 2, 3))
    told = list(resampled_sums(rows, 5))
    for one, drawn in zip(told, resamples(np.arange(7), 5), strict=True):
        np.testing.assert_allclose(one, rows[drawn].sum(0), rtol=1e-12)
    assert list(resampled_sums(rows[:1], 5)) == []
