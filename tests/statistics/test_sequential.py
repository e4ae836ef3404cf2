"""Betting against enumerations: fair under the null, Ville's inequality, intervals that hold at every look."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest

from steersman.statistics import sample_size, sequential
from steersman.statistics.sample_size import fixed_size, outcomes, plan, plan_arms
from steersman.statistics.sequential import (
    BETS,
    PRECISION,
    Look,
    Running,
    arm_difference,
    first_crossing,
    log_wealth,
    refuted,
)
from steersman.types import SteersmanError

VALUES = (0.0, 0.5, 1.0)


def every(n: int) -> np.ndarray:
    return np.array(list(itertools.product(VALUES, repeat=n)))


def every_look(x: np.ndarray, alpha: float = 0.05) -> list[Look]:
    """The look after each value."""
    running, out = Running(alpha), []
    for value in x:
        running.add([value])
        out.append(running.look())
    return out


def chance(paths: np.ndarray, m: float, ties: float) -> np.ndarray:
    """P of each path of iid wins, ties and losses with mean m."""
    weight = {0.0: 1 - ties - (m - ties / 2), 0.5: ties, 1.0: m - ties / 2}
    return np.prod(np.vectorize(weight.get)(paths), axis=1)


def wealth_by_hand(path, m: float) -> float:
    total = 0.0
    for k in BETS:
        up = down = 1.0
        for x in path:
            up *= 1 + (k / m) * (x - m)
            down *= 1 - (k / (1 - m)) * (x - m)
        total += up + down
    return total / (2 * len(BETS))


@pytest.mark.parametrize(("m", "ties"), [(0.5, 0.0), (0.5, 0.4), (0.3, 0.2), (0.8, 0.1)])
def test_the_wealth_is_a_fair_game_and_obeys_ville(m, ties):
    paths = every(8)
    p = chance(paths, m, ties)
    assert math.isclose(p.sum(), 1.0, rel_tol=1e-12)
    wealth = np.exp(log_wealth(paths, m))
    np.testing.assert_allclose(p @ wealth, np.ones(8), rtol=1e-12)
    for alpha in (0.5, 0.25, 0.1, 0.05):
        ever = (wealth >= 1 / alpha).any(1)
        assert p @ ever <= alpha
    # after every history, not only on average: the next value multiplies the wealth by 1 in expectation
    after = wealth.reshape(3**4, 3**4, 8)
    weights = p.reshape(3**4, 3**4)
    can = weights.sum(1) > 0
    told = (weights * after[:, :, -1]).sum(1)[can] / weights.sum(1)[can]
    np.testing.assert_allclose(told, after[can, 0, 3], rtol=1e-12)


def test_the_wealth_is_the_formula():
    rng = np.random.default_rng(0)
    for m in (0.2, 0.5, 0.77):
        x = rng.random(17)
        told = np.exp(log_wealth(x, m))
        for n in (1, 5, 17):
            assert math.isclose(told[n - 1], wealth_by_hand(x[:n], m), rel_tol=1e-12)


def test_at_a_wrong_mean_the_wealth_is_worth_more_than_one():
    p = chance(every(6), 0.7, 0.1)
    assert p @ np.exp(log_wealth(every(6), 0.5))[:, -1] > 1.2


def test_the_interval_is_what_is_not_refuted():
    rng = np.random.default_rng(1)
    x = rng.choice(VALUES, 200, p=[0.2, 0.2, 0.6])
    running = Running(0.05)
    running.add(x)
    look = running.look()
    grid = np.linspace(0.001, 0.999, 999)
    inside = grid[[log_wealth(x, float(m))[-1] < math.log(20) for m in grid]]
    assert abs(look.low - inside.min()) < 1.1e-3
    assert abs(look.high - inside.max()) < 1.1e-3
    assert len(inside) == round((inside.max() - inside.min()) / 0.998 * 998) + 1  # no hole
    assert look.low < x.mean() < look.high
    assert math.isclose(math.log(look.e_value), log_wealth(x, 0.5)[-1], rel_tol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_bounds_are_rounded_outwards(seed):
    """The means at the bounds are refuted already: rounding leaves no mean out that the values do not refute."""
    rng = np.random.default_rng(seed)
    x = rng.choice(VALUES, 60, p=[0.3, 0.2, 0.5])
    running = Running(0.05)
    running.add(x)
    look = running.look()
    assert 0 < look.low < look.high < 1
    assert wealth_by_hand(x, look.low) >= 20
    assert wealth_by_hand(x, look.high) >= 20


def test_an_interval_excludes_the_null_exactly_when_the_e_value_says_so():
    x = outcomes(0.1, 0.2, (1, 600), np.random.default_rng(2))[0]
    looks = every_look(x)
    first = int(first_crossing(x))
    excluded = [look.n for look in looks if not look.low < 0.5 < look.high]
    assert first
    assert excluded[0] == first
    lows = [look.low for look in looks]
    assert lows == sorted(lows)


@pytest.mark.parametrize(("m", "ties"), [(0.7, 0.0), (0.35, 0.3)])
def test_bounds_hold_at_all_looks_at_once_by_enumeration(m, ties):
    """Every sequence of five judgements: the chance that any look's interval misses the mean is at most alpha."""
    paths = every(5)
    p = chance(paths, m, ties)
    paths, p = paths[p > 0], p[p > 0]
    missed = np.array([any(not v.low <= m <= v.high for v in every_look(x, 0.4)) for x in paths])
    assert 0 < p @ missed <= 0.4


def test_peeking_after_every_judgement_errs_as_seldom_as_promised():
    rng = np.random.default_rng(3)
    x = outcomes(0.0, 0.2, (1000, 400), rng)
    wrong = (first_crossing(x, 0.05) > 0).mean()
    n = np.arange(1, 401)
    z = np.abs(np.cumsum(x - 0.5, 1)) / np.sqrt(n * 0.2)
    naive = (z[:, 9:] > 1.96).any(1).mean()
    assert wrong <= 0.05
    assert naive > 0.25  # what the usual test does when it is looked at as often


def test_ends_and_refusals():
    empty = Running().look()
    assert (empty.n, empty.low, empty.high, empty.e_value) == (0, 0.0, 1.0, 1.0)
    sure = Running()
    sure.add([1.0] * 50)
    assert sure.look().high == 1.0
    assert sure.look().low > 0.85
    with pytest.raises(ValueError, match="not within"):
        sure.add([1.2])
    drift = Running()
    drift.add([0.0] * 300)
    drift.look()
    drift.add([1.0] * 3000)
    last = drift.look()
    assert last.low > last.high


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_difference_of_arms_is_unbiased_and_fair_by_enumeration(share):
    """All outcomes and all assignments of five users: mean difference, and a fair game where there is none."""
    rates = {True: 0.7, False: 0.4}
    mean, fair = 0.0, 0.0
    for arms in itertools.product((True, False), repeat=5):
        for x in itertools.product((0.0, 1.0), repeat=5):
            a = math.prod(share if t else 1 - share for t in arms)
            z, r = arm_difference(np.array(x), np.array(arms), share)
            assert z.min() >= 0
            assert z.max() <= 1
            p = a * math.prod(rates[t] if v else 1 - rates[t] for t, v in zip(arms, x, strict=True))
            mean += p * (2 * float(z[-1]) - 1) * r
            null = a * math.prod(0.6 if v else 0.4 for v in x)
            fair += null * math.exp(log_wealth(z, 0.5)[-1])
    assert math.isclose(mean, 0.3, rel_tol=1e-12)
    assert math.isclose(fair, 1.0, rel_tol=1e-12)


def test_sizes():
    assert fixed_size(0.05, 0.5) == 785  # the textbook's figure for 55% against 50%
    told = plan(0.1, runs=200)
    assert told.fixed < told.needed < 3 * told.fixed
    assert told.median < told.needed
    rng = np.random.default_rng(9)
    seen = (first_crossing(outcomes(0.1, 0.0, (400, told.needed), rng)) > 0).mean()
    assert abs(seen - 0.8) < 0.08
    arms = plan_arms(0.5, 0.2, share=0.5, runs=200)
    assert arms.fixed == math.ceil((2.8015 / 0.2) ** 2 * (0.25 + 0.21) / 0.5)
    assert arms.fixed < arms.needed < 3 * arms.fixed
    with pytest.raises(ValueError, match="no two different shares"):
        plan_arms(0.95, 0.2)
    with pytest.raises(ValueError, match="does not fit"):
        plan(0.4, ties=0.5)


@pytest.mark.parametrize("m", [-0.1, 0.0, 0.3, 0.5, 0.6, 1.0, 1.1])
def test_a_mean_is_refuted_where_the_bounds_first_leave_it_behind(m, monkeypatch):
    """And once: the same places for every number of values that comes after."""
    monkeypatch.setattr(sequential, "PIECE", 64)
    x = (np.random.default_rng(5).random(400) < 0.58).astype(float)
    looks = every_look(x)
    above = next((look.n for look in looks if look.low > m + 2 * PRECISION), 0)
    below = next((look.n for look in looks if look.high < m - 2 * PRECISION), 0)
    found = [refuted(x[:n], m) for n in range(401)]
    assert found[-1] == (above, below)
    for n, told in enumerate(found):
        assert told == tuple(place if place <= n else 0 for place in (above, below))


def test_a_crossing_is_found_piece_by_piece():
    x = outcomes(0.045, 0.2, (3, 4, 1300), np.random.default_rng(4))
    over = log_wealth(x, 0.5) >= math.log(20)
    expected = np.where(over.any(-1), over.argmax(-1) + 1, 0)
    assert (expected > 1024).any()
    assert (expected == 0).any()
    assert first_crossing(x).tolist() == expected.tolist()


@pytest.mark.parametrize("block", [1, 3, 40])
def test_a_block_is_looked_at_as_its_values_are(block):
    kinds = sample_size._Kinds(np.array([1.0, 0.5, 0.2]), np.array([0.5, 0.2, 0.3]))
    found = sample_size._first_block(kinds, block, (30, 400), 0.05, np.random.default_rng(5))
    counts = np.random.default_rng(5).multinomial(block, kinds.chances, size=(30, 400))
    x = np.array([[v for of in row for v in np.repeat(kinds.values, of)] for row in counts])
    over = log_wealth(x, 0.5)[:, block - 1 :: block] >= math.log(20)
    assert found.tolist() == np.where(over.any(-1), over.argmax(-1) + 1, 0).tolist()
    assert (found > 0).any()


def test_sizes_of_large_effects_are_as_they_were():
    """Found by looking after every single value of whole experiments."""
    for ties, median, needed in ((0.0, 852, 1472), (0.4, 532, 905)):
        told = plan(0.05, ties=ties)
        assert (told.median, told.needed) == (median, needed)
    arms = plan_arms(0.1, -0.05)
    assert (arms.median, arms.needed) == (982, 1679)


def test_sizes_in_blocks_are_those_of_single_values(monkeypatch):
    single = plan(0.08, runs=3000), plan_arms(0.3, 0.2, share=0.3, runs=3000)
    monkeypatch.setattr(sample_size, "LOOKS", 450)
    blocks = plan(0.08, runs=3000), plan_arms(0.3, 0.2, share=0.3, runs=3000)
    for one, many in zip(single, blocks, strict=True):
        assert many.needed == pytest.approx(one.needed, rel=0.06)
        assert many.median == pytest.approx(one.median, rel=0.06)


def test_a_small_effect_costs_no_more_than_a_middling_one():
    tracemalloc.start()
    start = time.process_time()
    told, arms = plan(0.004, runs=100), plan_arms(0.3, 0.004, runs=100)
    assert time.process_time() - start < 20
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()
    assert 1.5 * told.fixed < told.needed < 3.5 * told.fixed
    assert 1.5 * arms.fixed < arms.needed < 3.5 * arms.fixed


def test_an_effect_below_the_smallest_bet_is_refused():
    with pytest.raises(SteersmanError, match=r"effect: 0\.002 is never seen .* set one above 0\.0025"):
        plan(0.002)
    with pytest.raises(SteersmanError, match=r"effect: 0\.002 is never seen .* set one above 0\.0021"):
        plan_arms(0.3, -0.002)
    assert plan(0.002, ties=0.5, runs=50).needed > 0
