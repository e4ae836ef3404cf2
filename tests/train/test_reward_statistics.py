"""Intervals, calibration and agreement beside textbook values and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from steersman.statistics.estimates import auc, bootstrap, calibration, kendall, mean, spearman, wilson
from steersman.statistics.reward_report import (
    binary_report,
    pair_report,
    ranking_report,
    rater_agreement,
    rating_report,
)

RNG = np.random.default_rng


def test_wilson_is_scipys():
    for right, n in ((0, 10), (7, 10), (10, 10), (812, 1000)):
        known = stats.binomtest(right, n).proportion_ci(method="wilson")
        found = wilson(right, n)
        assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=1e-6)
    assert math.isnan(wilson(0, 0).value)


def test_the_bootstrap_covers_and_clusters_widen_it():
    rng = RNG(0)
    hits = sum(
        found.low <= 0 <= found.high
        for _ in range(60)
        for found in [bootstrap(mean, [rng.normal(size=50)], draws=200)]
    )
    assert hits >= 50
    owner = np.repeat(np.arange(20), 10)
    x = rng.normal(size=20)[owner] + 0.1 * rng.normal(size=200)
    alone, clustered = bootstrap(mean, [x]), bootstrap(mean, [x], clusters=owner)
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)
    assert bootstrap(mean, [np.array([1.0])]).low == -math.inf


def test_calibration_by_hand():
    said, outcome = np.array([0.55, 0.58, 0.95, 0.97]), np.array([1.0, 0.0, 1.0, 1.0])
    found = calibration(said, outcome, low=0.5)
    assert found.count == [2, 2]
    assert found.ece == pytest.approx((2 * abs(0.565 - 0.5) + 2 * abs(0.96 - 1)) / 4)
    assert calibration(np.array([1.0]), np.array([1.0])).ece == 0


def test_correlations_are_scipys_and_say_nan_where_nothing_varies():
    x, y = RNG(1).normal(size=30), RNG(2).integers(0, 4, size=30).astype(float)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert math.isnan(spearman(x, np.ones(30)))
    assert math.isnan(kendall(x, np.ones(30)))
    label = (y > 1).astype(float)
    pairs = [(a > b) + 0.5 * (a == b) for a in x[label == 1] for b in x[label == 0]]
    assert auc(x, label) == pytest.approx(np.mean(pairs))
    assert math.isnan(auc(x, np.ones(30)))
    assert auc(np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.5, 1.0])) == 1.0  # an undecided label is no positive
    assert auc(np.array([3.0, 1.0, 2.0]), np.array([0.5, 0.0, 1.0])) == 0.5


def test_a_pair_report_by_hand():
    lead = np.array([2.0, -1.0, 0.0, 3.0, 1.0])
    target = np.array([1.0, 2 / 3, 1.0, 0.5, 0.0])
    lengths = np.array([[5, 2], [1, 4], [3, 3], [9, 1], [2, 8]])
    votes = [(1, 1, 1), (1, 1, 0), (1, 1, 1), (1, 0, 0.5), (0, 0, 0)]
    scores = np.stack([lead, np.zeros(5)], 1)
    report = pair_report(lead, target, lengths=lengths, scores=scores, votes=votes, prompts=np.arange(5),
                         subset=["x", "x", "y", "y", "y"], draws=100)  # fmt: skip
    assert report.numbers["accuracy"].value == pytest.approx((1 + 0 + 0.5 + 0) / 4)  # the fourth is a tie
    assert report.numbers["agreement_with_a_rater"].value == pytest.approx((1 + 1 / 3 + 0.5 + 0.5 + 0) / 5)
    assert report.baselines["longer_wins"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert report.raters["ceiling"] == pytest.approx((1 + 2 / 3 + 1 + 0.5 + 1) / 5)
    assert report.raters["two_raters"] == pytest.approx((3 + 1 + 3 + 1 + 3) / 15)
    assert report.raters["one_against_the_rest"] == pytest.approx((3 + 0 + 3 + 0 + 3) / (3 + 1 + 3 + 2 + 3))
    assert report.subsets["x"].value == 0.5
    assert report.subsets["y"].n == 2


def test_one_against_the_rest():
    # (1, 1, 0): each 1 meets a split rest, which decides nothing; the 0 meets two ones and is wrong
    assert rater_agreement([(1, 1, 0)], np.array([2 / 3]))["one_against_the_rest"] == 0
    assert rater_agreement([(1, 1, 1)], np.array([1.0]))["one_against_the_rest"] == 1
    assert rater_agreement([(1,), ()], np.array([1.0, 1.0])) == {}


def test_a_ranking_report_by_hand():
    report = ranking_report([[3.0, 1.0, 2.0], [0.0, 5.0]], [[0, 1, 2], [1, 1]], [[1, 2, 3], [4, 5]], draws=100)
    assert report.numbers["accuracy"].value == pytest.approx(2 / 3)
    assert report.numbers["accuracy"].n == 3
    assert report.numbers["best_found"].value == 1.0
    assert report.numbers["kendall"].value == pytest.approx(1 / 3)
    assert report.baselines["longer_wins"] == 0


def test_a_rating_report_by_hand():
    said = np.array([[1.0, 9.0], [2.0, 7.0], [3.0, 8.0]])
    truth = np.array([[1.0, np.nan], [1.0, 7.0], [5.0, 9.0]])
    report = rating_report(said, truth, ["x", "y"], usual=np.array([2.0, 8.0]), lengths=np.array([1.0, 2, 3]),
                           prompts=np.arange(3), draws=100)  # fmt: skip
    assert report.numbers["x/rmse"].value == pytest.approx(math.sqrt(5 / 3))
    assert report.numbers["y/rmse"].n == 2
    assert report.baselines["x/rmse_of_the_mean"] == pytest.approx(math.sqrt((1 + 1 + 9) / 3))
    assert report.baselines["y/spearman_of_length"] == pytest.approx(1.0)


def test_a_binary_report_by_hand():
    report = binary_report(np.array([2.0, -1.0, 0.5, -3.0]), np.array([1.0, 1.0, 0.0, 0.0]), base=0.75,
                           lengths=np.array([4.0, 3, 2, 1]), clusters=np.arange(4), subset=["x", "x", "y", "x"],
                           draws=100)  # fmt: skip
    assert report.numbers["accuracy"].value == 0.5
    assert report.numbers["auc"].value == 0.75
    assert report.baselines["more_frequent_class"] == 0.5
    assert report.baselines["auc_of_length"] == 1.0
    assert report.baselines["more_frequent_class_of_each_subset"] == 0.75
    assert report.baselines["cross_entropy_of_the_share"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
