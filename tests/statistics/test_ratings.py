"""Bradley-Terry against scipy's optimiser, known strengths recovered, ties counted, intervals that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.stats import beta

from steersman.statistics.ratings import SCALE, Battle, bradley_terry, ratings

WINS = np.array([[0, 7.5, 3], [2.5, 0, 6], [1, 4, 0]])


def test_the_fit_is_the_maximum_of_the_likelihood():
    def negative(theta):
        total = 0.0
        for i in range(3):
            total += 0.5 * (math.log1p(math.exp(-theta[i])) + math.log1p(math.exp(theta[i])))
            for j in range(3):
                total += WINS[i, j] * math.log1p(math.exp(theta[j] - theta[i]))
        return total

    found = minimize(negative, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(bradley_terry(WINS), found, atol=1e-5)


def test_two_players_by_hand():
    battles = [Battle("a", "b", s, i) for i, s in enumerate([1.0] * 6 + [0.0] * 2 + [0.5] * 4)]
    told = {r.player: r for r in ratings(battles, anchor="b")}
    assert told["b"].rating == told["b"].low == told["b"].high == 1000
    # 8 won and 4 lost, each tie being half of both; half a battle won and lost against the mean, 0, of t and -t
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    t = brentq(lambda t: 2 * (8 - 12 * sigmoid(2 * t)) + (1 - 2 * sigmoid(t)), 0, 2)
    assert told["a"].rating == pytest.approx(1000 + SCALE * 2 * t)
    assert told["a"].low < told["a"].rating < told["a"].high
    assert told["a"].battles == 12


def test_known_strengths_are_recovered_and_covered():
    rng = np.random.default_rng(0)
    true = {"a": 0.0, "b": 0.8, "c": -0.5}
    names, battles = list(true), []
    for group in range(1500):
        first, second = rng.choice(3, 2, replace=False)
        gap = true[names[first]] - true[names[second]]
        battles.append(Battle(names[first], names[second], float(rng.random() < 1 / (1 + math.exp(-gap))), group))
    for r in ratings(battles, anchor="a", draws=100):
        wanted = 1000 + SCALE * true[r.player]
        assert abs(r.rating - wanted) < 40
        assert r.low - 10 <= wanted <= r.high + 10


def test_who_won_everything_has_a_finite_rating():
    told = ratings([Battle("a", "b", 1.0, i) for i in range(10)], anchor="b", draws=20)
    assert [r.player for r in told] == ["a", "b"]
    assert 1000 < told[0].rating < 3000


def test_the_intervals_narrow_with_prompts_and_repeat_with_the_seed():
    rng = np.random.default_rng(1)
    shares = (rng.random(400) < 0.6).astype(float)
    few = ratings([Battle("a", "b", s, i) for i, s in enumerate(shares[:40])], anchor="b", seed=3)
    many = ratings([Battle("a", "b", s, i) for i, s in enumerate(shares)], anchor="b", seed=3)
    width = [next(r.high - r.low for r in t if r.player == "a") for t in (few, many)]
    assert width[1] < width[0] / 2
    assert many == ratings([Battle("a", "b", s, i) for i, s in enumerate(shares)], anchor="b", seed=3)


def of(name: str, battles: list[Battle], anchor: str = "b", draws: int = 300):
    return next(r for r in ratings(battles, anchor=anchor, draws=draws) if r.player == name)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_who_won_everything_has_the_interval_of_a_uniform_prior(n):
    """The share of n won of n is Beta(n + 1, 1)."""
    found = of("a", [Battle("a", "b", 1.0, i) for i in range(n)], draws=3000)
    share = 1 / (1 + 10 ** ((1000 - found.low) / 400))
    assert share == pytest.approx(beta.ppf(0.025, n + 1, 1), abs=0.03)
    assert found.low < found.rating < found.high < 4000


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_groups_that_agree_tell_more_the_more_there_are(share):
    several = [of("a", [Battle("a", "b", share, i) for i in range(n)]) for n in (3, 12, 48)]
    assert all(r.low < r.rating < r.high for r in several)
    if share == 0.5:
        open_ = [r.high - r.low for r in several]
    else:  # the share that it may still lose, or win
        gaps = [r.low - 1000 if share else 1000 - r.high for r in several]
        open_ = [1 / (1 + 10 ** (gap / 400)) for gap in gaps]
    assert open_[0] / 2 > open_[1] > 2 * open_[2] > 0
    assert several[0].low < 1000 < several[0].high, "three of three may be chance"


def test_a_group_that_says_one_thing_many_times_counts_once():
    once = of("a", [Battle("a", "b", 1.0, i) for i in range(4)])
    often = of("a", [Battle("a", "b", 1.0, i) for i in range(4) for _ in range(30)])
    assert often.low == pytest.approx(once.low, abs=60)
    assert of("a", [Battle("a", "b", 1.0, i) for i in range(120)]).low > often.low + 200
    assert often.low < often.rating <= often.high


def test_only_players_whose_groups_agree_are_widened():
    mixed = [Battle("a", "b", float(i % 3 > 0), i) for i in range(30)]
    lost = [Battle("b", "c", 1.0, i) for i in range(30)]
    alone, beside = of("a", mixed), of("a", mixed + lost)
    assert (beside.low, beside.high) == pytest.approx((alone.low, alone.high), abs=15)
    c = of("c", mixed + lost)
    assert c.high - c.low > 300
    every = [of(name, mixed + lost, anchor="c") for name in "ab"]
    assert all(r.high - r.low > 300 for r in every), "how far they are from one who lost everything is not known"


def test_a_single_group_says_nothing_of_how_far_off_its_rating_is():
    shares = [1.0] * 6 + [0.0] * 2
    one, many = (
        {r.player: r for r in ratings([Battle("a", "b", s, i * apart) for i, s in enumerate(shares)], anchor="b")}
        for apart in (0, 1)
    )
    assert one["a"].rating == many["a"].rating
    assert (one["a"].low, one["a"].high, one["a"].interval) == (-math.inf, math.inf, "–")
    assert one["a"].plain() == {"player": "a", "rating": one["a"].rating, "low": None, "high": None, "battles": 8}
    assert -math.inf < many["a"].low < many["a"].rating < many["a"].high < math.inf
    assert one["b"].low == one["b"].high == 1000  # the yardstick, wherever it was measured
