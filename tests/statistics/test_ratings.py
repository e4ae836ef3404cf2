"""Bradley-Terry against scipy's optimiser, known strengths recovered, ties counted, intervals that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from steersman.statistics.ratings import SCALE, Battle, bradley_terry, ratings

WINS = np.array([[0, 7.5, 3], [2.5, 0, 6], [1, 4, 0]])


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_the_fit_is_the_maximum_of_the_likelihood(prior):
    def negative(theta):
        total = 0.0
        for i in range(3):
            total += prior * (math.log1p(math.exp(-theta[i])) + math.log1p(math.exp(theta[i])))
            for j in range(3):
                total += WINS[i, j] * math.log1p(math.exp(theta[j] - theta[i]))
        return total

    found = minimize(negative, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x
    wanted = found if prior else found - found.mean()
    np.testing.assert_allclose(bradley_terry(WINS, prior), wanted, atol=1e-5)


def test_two_players_by_hand():
    battles = [Battle("a", "b", s, i) for i, s in enumerate([1.0] * 6 + [0.0] * 2 + [0.5] * 4)]
    told = {r.player: r for r in ratings(battles, anchor="b", prior=0.0)}
    assert told["b"].rating == told["b"].low == told["b"].high == 1000
    # 8 won and 4 lost, each tie being half of both
    assert told["a"].rating == pytest.approx(1000 + SCALE * math.log(8 / 4))
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
