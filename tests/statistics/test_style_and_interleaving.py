"""Style-controlled ratings against scipy's optimiser and known truths; team draft by enumeration of its coins."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from steersman.statistics.interleaving import credit, team_draft
from steersman.statistics.ratings import SCALE, Battle, ratings
from steersman.statistics.style import controlled_ratings, style


def world(count: int, length_effect: float, seed: int = 0) -> list[Battle]:
    """c is better than b by 1 nat; a is as good as b and writes at length, which is worth `length_effect` nats."""
    rng = np.random.default_rng(seed)
    theta, long = {"a": 0.0, "b": 0.0, "c": 1.0}, {"a": 0.8, "b": 0.0, "c": 0.1}
    out = []
    for i in range(count):
        x, y = rng.choice(["a", "b", "c"], 2, replace=False)
        d = long[x] - long[y] + rng.normal(0, 0.4)
        p = 1 / (1 + math.exp(-(theta[x] - theta[y] + length_effect * d)))
        out.append(Battle(str(x), str(y), float(rng.random() < p), i % 200, (d,)))
    return out


def test_the_fit_is_the_maximum_of_the_likelihood():
    battles = world(60, 1.0)
    battles[3] = Battle("a", "b", 0.5, 3, (0.3,))
    told = controlled_ratings(battles, anchor="b", features=("length",), draws=0)
    x = np.array([b.style[0] for b in battles])
    spread = np.sqrt((x**2).mean())

    def negative(v):
        theta, total = dict(zip("abc", v[:3], strict=True)), v[3] ** 2 / 18
        for b in battles:
            z = theta[b.first] - theta[b.second] + v[3] * b.style[0] / spread
            total += b.share * math.log1p(math.exp(-z)) + (1 - b.share) * math.log1p(math.exp(z))
        return total + sum(0.5 * (math.log1p(math.exp(-t)) + math.log1p(math.exp(t))) for t in v[:3])

    found = minimize(negative, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    mine = {r.player: r.rating for r in told.ratings}
    for name, theta in zip("abc", found[:3], strict=True):
        assert math.isclose(mine[name], 1000 + SCALE * (theta - found[1]), abs_tol=0.01)
    assert math.isclose(told.effects["length"].value, SCALE * found[3], abs_tol=0.01)


def test_the_battles_of_one_user_have_no_interval():
    told = controlled_ratings(
        [replace(b, group=0) for b in world(60, 1.0)], anchor="b", features=("length",), draws=20
    )
    assert {r.interval for r in told.ratings if r.player != "b"} == {"–"}
    assert told.effects["length"].plain()["low"] is None


def test_users_who_all_agree_leave_the_rating_open():
    """As `ratings` has it, and a feature that never differs has no interval."""
    battles = [Battle("a", "b", 1.0, i, (0.0,)) for i in range(6)]
    told = controlled_ratings(battles, anchor="b", features=("length",))
    fair, plain = (next(r for r in x if r.player == "a") for x in (told.ratings, ratings(battles, anchor="b")))
    assert fair.low == pytest.approx(plain.low, abs=40)
    assert fair.low < fair.rating - 200
    assert fair.high > fair.rating + 200
    assert told.effects["length"].plain() == {"value": 0.0, "low": None, "high": None, "n": 6}


def turned(b: Battle) -> Battle:
    """The same battle with its answers the other way round."""
    return Battle(b.second, b.first, 1 - b.share, b.group, tuple(-x for x in b.style))


@pytest.mark.parametrize("difference", ["varies", "constant"])
def test_it_does_not_matter_which_answer_stands_first(difference):
    """Also where one model always writes longer by the same amount; then length can not take more than its prior lets
    it, and what the lead loses it has gained."""
    battles = [b for b in world(400, 1.0) if {b.first, b.second} == {"b", "c"}]
    if difference == "constant":
        battles = [replace(b, style=(0.3 if b.first == "c" else -0.3,)) for b in battles]
    mixed = [b if i % 2 else turned(b) for i, b in enumerate(battles)]
    sorted_ = [b if b.first == "c" else turned(b) for b in battles]
    told = [
        controlled_ratings(rows, anchor="b", features=("length",), draws=20) for rows in (battles, mixed, sorted_)
    ]
    leads = [next(r.rating for r in one.ratings if r.player == "c") - 1000 for one in told]
    lengths = [one.effects["length"].value for one in told]
    assert leads == pytest.approx([leads[0]] * 3, abs=1e-6)
    assert lengths == pytest.approx([lengths[0]] * 3, abs=1e-6)
    if difference == "constant":
        plain = ratings(battles, anchor="b", draws=0)
        lead = next(r.rating for r in plain if r.player == "c") - 1000
        assert lead > 50
        assert leads[0] + lengths[0] == pytest.approx(lead, rel=0.1)


def test_without_features_it_is_bradley_terry():
    battles = world(300, 0.0)
    plain = ratings(battles, anchor="b", draws=10)
    told = controlled_ratings(battles, anchor="b", features=(), draws=10)
    for one, other in zip(plain, told.ratings, strict=True):
        assert (one.player, one.battles) == (other.player, other.battles)
        assert math.isclose(one.rating, other.rating, abs_tol=1e-4)
    assert told.effects == {}


def test_a_lead_that_is_length_alone_goes_away():
    battles = world(3000, 2.0)
    plain = {r.player: r for r in ratings(battles, anchor="b")}
    told = controlled_ratings(battles, anchor="b", features=("length",))
    fair = {r.player: r for r in told.ratings}
    assert plain["a"].low > 1100
    assert fair["a"].low < 1000 < fair["a"].high
    assert fair["c"].low < 1000 + SCALE < fair["c"].high
    assert told.effects["length"].low > 0
    spread = np.sqrt(np.mean([b.style[0] ** 2 for b in battles]))
    assert told.effects["length"].low < 2.0 * SCALE * spread < told.effects["length"].high


def test_style_by_hand():
    first = "# Head\n\n- one\n- two\n1. three\n\n**bold** and more"
    second = "one two **x** __y__ three four\n- five"
    length = (8 - 7) / 15  # head one two 1 three bold and more; one two x y three four five
    assert style(first, second) == pytest.approx((length, 1.0, (3 - 1) / 4, (1 - 2) / 3))
    assert style("", "") == (0.0, 0.0, 0.0, 0.0)
    assert style("a*b", "2 - 3") == pytest.approx(((2 - 2) / 4, 0, 0, 0))


class Coins(random.Random):
    """Coins that are given."""

    def __init__(self, coins: list[int]) -> None:
        super().__init__(0)
        self.coins = coins

    def randrange(self, *_: int) -> int:
        return self.coins.pop(0)


def test_team_draft_by_its_coins():
    a, b = ["x", "y", "z"], ["y", "w", "x"]
    assert team_draft(a, b, 4, Coins([0, 0])) == [("x", 0), ("y", 1), ("z", 0), ("w", 1)]
    assert team_draft(a, b, 4, Coins([1, 1])) == [("y", 1), ("x", 0), ("w", 1), ("z", 0)]
    assert team_draft(a, ["x"], 9, Coins([0, 0, 0])) == [("x", 0), ("y", 0), ("z", 0)]
    assert credit([("x", 0), ("y", 1), ("z", 0), ("w", 1)], ["y", "w", "x"]) == 1.0
    assert credit([("x", 0), ("y", 1)], ["x"]) == 0.0
    assert credit([("x", 0), ("y", 1)], ["x", "y"]) == credit([("x", 0)], []) == 0.5


def test_equal_rankings_are_a_fair_coin_wherever_people_click():
    """Over all coins the credit of equal rankings is one half, for every set of positions that is clicked."""
    ranking = ["p", "q", "r", "s"]
    for clicked in ([0], [0, 1], [0, 1, 2], [1, 3]):
        total = 0.0
        for coins in range(4):
            shown = team_draft(ranking, ranking, 4, Coins([coins & 1, coins >> 1]))
            assert [item for item, _ in shown] == ranking
            total += credit(shown, [shown[i][0] for i in clicked])
        assert total / 4 == 0.5


def test_interleaving_needs_fewer_users_than_two_groups():
    """Users differ in how often they click at all. Squared effect in standard deviations is users per decision."""
    rng, coins, n = np.random.default_rng(0), random.Random(0), 12_000
    wanted, good, bad = [0.6, 0.55, 0.5, 0.45, 0.4, 0.35], [0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2]
    own = rng.beta(0.5, 0.5, n)

    def picks(items: list[int], user: int) -> list[int]:
        return [i for i in items if rng.random() < own[user] * wanted[i]]

    lists = [team_draft(bad, good, 4, coins) for _ in range(n)]
    shares = np.array([credit(shown, picks([i for i, _ in shown], u)) for u, shown in enumerate(lists)])
    treated = rng.random(n) < 0.5
    clicks = np.array([len(picks((good if t else bad)[:4], u)) for u, t in enumerate(treated)])
    together = (shares.mean() - 0.5) / shares.std()
    spread = math.sqrt(clicks[treated].var() / 0.5 + clicks[~treated].var() / 0.5)
    apart = (clicks[treated].mean() - clicks[~treated].mean()) / spread
    assert (together / apart) ** 2 > 3
