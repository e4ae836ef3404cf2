"""Intervals of shares hold for few trials and clusters: counted out exactly, and against scipy's binomial ones."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from steersman.statistics.estimates import auc, ranked_share, share


@pytest.mark.parametrize(("won", "n"), [(0, 3), (2, 2), (5, 8), (40, 60)])
def test_whole_trials_have_the_exact_binomial_interval(won, n):
    exact = stats.binomtest(won, n).proportion_ci(method="exact")
    got = share(np.array([1.0] * won + [0.0] * (n - won)), np.arange(n))
    assert (got.value, got.n) == (won / n, n)
    assert got.low == pytest.approx(exact.low, abs=1e-12)
    assert got.high == pytest.approx(exact.high, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 10, 20, 40])
@pytest.mark.parametrize("size", [1, 4])
def test_a_coin_is_seldom_called_better_than_one(n, size):
    """Of n prompts whose `size` judgements all say the same, which is the worst case."""
    clusters = np.repeat(np.arange(n), size)
    above = 0.0
    for won in range(n + 1):
        values = (clusters < won).astype(float)
        above += stats.binom.pmf(won, n, 0.5) * (share(values, clusters).low > 0.5)
    assert above <= 0.025


def test_unequal_clusters_are_worth_less():
    equal = share(np.ones(12), np.repeat(np.arange(6), 2))
    unequal = share(np.ones(12), np.array([0] * 7 + [1, 2, 3, 4, 5]))
    assert unequal.low < equal.low == pytest.approx(0.025 ** (1 / 6))
    assert unequal.low == pytest.approx(0.025 ** (54 / 144))


@pytest.mark.parametrize(("liked", "disliked"), [(2, 2), (2, 6), (3, 4), (4, 4), (5, 5)])
def test_scores_that_know_nothing_are_seldom_called_better(liked, disliked):
    """Over every order of the answers, all equally likely."""
    n, above, orders = liked + disliked, 0, 0
    for up in combinations(range(n), liked):
        label = np.isin(np.arange(n), up).astype(float)
        got = ranked_share(np.arange(n, dtype=float), label, np.arange(n))
        assert got.value == auc(np.arange(n), label)
        above, orders = above + (got.low > 0.5), orders + 1
    assert above / orders <= 0.025


def test_of_nothing_nothing_is_known():
    assert math.isnan(share(np.zeros(0), np.zeros(0)).value)
    assert (share(np.zeros(0), np.zeros(0)).low, share(np.zeros(0), np.zeros(0)).high) == (0.0, 1.0)
    one_label = ranked_share(np.arange(3.0), np.ones(3), np.arange(3))
    assert math.isnan(one_label.value)
    assert (one_label.low, one_label.high) == (0.0, 1.0)
