"""How many values a test needs: fixed beforehand, or looked at after every one.

Experiments are simulated. Their length grows with 1 / effect^2; beyond `LOOKS` values they are drawn and looked at in
blocks, so that a small effect costs no more than a middling one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from steersman.statistics.sequential import BETS, PIECE, Array, arm_difference, first_crossing
from steersman.types import SteersmanError

LOOKS = 8192
"""Looks at a simulated experiment at most. A block longer than one value finds the end late, by less than 1%."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Values that a sequential test needs to see an effect: in half of experiments, and in `power` of them.

    `fixed` is what a test at one size chosen beforehand needs for the same power; it may be looked at once only.
    """

    what: str
    effect: float
    power: float
    alpha: float
    median: int
    needed: int
    fixed: int

    def __str__(self) -> str:
        return (
            f"to see {self.what} with {self.power:.0%} power: at most {self.needed:,} (half the time at most "
            f"{self.median:,}); a test looked at once, at the end, needs {self.fixed:,}"
        )


def fixed_size(effect: float, sd: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """N of a two-sided test of a mean at one size: ((z_{1-alpha/2} + z_power) sd / effect)^2, rounded up."""
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return math.ceil((z * sd / effect) ** 2)


def outcomes(effect: float, ties: float, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Wins (1), ties (0.5) and losses (0) with mean 1/2 + effect and the given share of ties."""
    u = rng.random(shape)
    win = (1 - ties) / 2 + effect
    return np.where(u < win, 1.0, np.where(u < win + ties, 0.5, 0.0))


def plan(effect: float, *, ties: float = 0.0, alpha: float = 0.05, power: float = 0.8, runs: int = 400) -> Plan:
    """The size of a win-rate test that is looked at after every value, by simulating `runs` experiments.

    `effect` is the win rate's distance from 1/2, in (0, (1 - ties) / 2]. Raises ValueError outside it, and
    SteersmanError where it is so small that the test never sees it. Where more than `LOOKS` values are simulated,
    sizes are whole blocks.
    """
    if not 0 < effect <= (1 - ties) / 2:
        raise ValueError(f"an effect of {effect} does not fit a share of ties of {ties}")
    win = (1 - ties) / 2 + effect
    sd = math.sqrt(win + ties / 4 - (0.5 + effect) ** 2)
    fixed = fixed_size(effect, max(sd, 1e-3), alpha=alpha, power=power)
    kinds = _Kinds(np.array([1.0, 0.5, 0.0]), np.array([win, ties, max(1 - win - ties, 0.0)]))
    kinds.check_seen(effect)
    median, needed = _sizes(lambda shape, rng: outcomes(effect, ties, shape, rng), kinds, fixed, alpha, power, runs)
    return Plan(f"a win rate of {0.5 + effect:.3f}", effect, power, alpha, median, needed, fixed)


def plan_arms(
    rate: float, effect: float, *, share: float = 0.5, alpha: float = 0.05, power: float = 0.8, runs: int = 400
) -> Plan:
    """The same in users of both arms together, for a yes or no of each: `rate` in the control, `rate + effect` in the
    treatment, which a `share` of users meets. Raises ValueError where these are no shares, SteersmanError as `plan`.

    In blocks `arm_difference` centres at the mean outcome, to which its running mean tends.
    """
    better = rate + effect
    if not (0 <= rate <= 1 and 0 <= better <= 1 and effect):
        raise ValueError(f"rates of {rate} and {better} are no two different shares")
    spread = math.sqrt(rate * (1 - rate) / (1 - share) + better * (1 - better) / share)
    fixed = fixed_size(effect, max(spread, 1e-3), alpha=alpha, power=power)

    def draw(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        treated = rng.random(shape) < share
        x = (rng.random(shape) < np.where(treated, better, rate)).astype(float)
        return np.stack([arm_difference(values, t, share)[0] for values, t in zip(x, treated, strict=True)])

    x, treated = np.array([1.0, 0.0, 1.0, 0.0]), np.array([True, True, False, False])
    chances = np.array([share * better, share * (1 - better), (1 - share) * rate, (1 - share) * (1 - rate)])
    kinds = _Kinds(arm_difference(x, treated, share, centre=float(chances @ x))[0], chances)
    kinds.check_seen(effect)
    median, needed = _sizes(draw, kinds, fixed, alpha, power, runs)
    return Plan(f"{better:.3f} instead of {rate:.3f}", effect, power, alpha, median, needed, fixed)


@dataclass(frozen=True, slots=True)
class _Kinds:
    """The values [V] in [0, 1] that independent outcomes have, and the chance of each [V]."""

    values: Array
    chances: Array

    def factors(self) -> Array:
        """log of what each bet against a mean of 1/2 is multiplied by at each value [V, 2D], as in `log_wealth`."""
        return np.log1p(np.outer(2 * self.values - 1, np.concatenate([BETS, -BETS])))

    def check_seen(self, effect: float) -> None:
        """Raises SteersmanError where every bet loses on average: the wealth of such a test goes to 0."""
        if (self.chances @ self.factors()).max() > 0:
            return
        won = 2 * self.values - 1
        least = BETS[0] * (self.chances @ won**2) / (2 * abs(self.chances @ won)) * abs(effect)
        raise SteersmanError(
            f"effect: {abs(effect):g} is never seen by a test that may be looked at any time, whose smallest bet is "
            f"{BETS[0]:g} of the wealth; set one above {least:.2g}, or use a test of fixed size"
        )


def _sizes(
    draw: Callable[[tuple[int, ...], np.random.Generator], Array], kinds: _Kinds, fixed: int, alpha: float,
    power: float, runs: int,
) -> tuple[int, int]:  # fmt: skip
    """After how many values half of the experiments, and `power` of them, have ended.

    `draw` gives outcomes one by one, `kinds` the chances by which they are drawn in blocks. The random stream is
    fixed.
    """
    rng, length = np.random.default_rng(0), max(60, 3 * fixed)
    never = np.iinfo(np.int64).max
    while True:
        block = math.ceil(length / LOOKS)
        parts = [
            first_crossing(draw((50, length), rng), alpha)
            if block == 1
            else block * _first_block(kinds, block, (50, math.ceil(length / block)), alpha, rng)
            for _ in range(max(runs // 50, 1))
        ]
        found = np.concatenate(parts)
        stopped = np.sort(np.where(found == 0, never, found))
        median, needed = (int(stopped[math.ceil(q * len(stopped)) - 1]) for q in (0.5, power))
        if needed < never:
            return median, needed
        length *= 2


def _first_block(
    kinds: _Kinds, block: int, shape: tuple[int, int], alpha: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """After how many blocks of `block` values the e-value against a mean of 1/2 is first seen at 1/alpha or more, in
    experiments of `shape` (experiments, blocks); 0 where it never is.

    The wealth after a block depends only on how often each value came, so it is `sequential.log_wealth` there.
    """
    rows, blocks = shape
    found, going = np.zeros(rows, np.int64), np.arange(rows)
    factors, before = kinds.factors(), np.zeros((rows, 1, 2 * len(BETS)))
    for start in range(0, blocks, PIECE):
        counts = rng.multinomial(block, kinds.chances, size=(len(going), min(PIECE, blocks - start)))
        logs = before + np.cumsum(counts @ factors, axis=1)
        over = np.exp(np.minimum(logs, 700.0)).mean(-1) >= 1 / alpha
        there = over.any(-1)
        found[going[there]] = start + over[there].argmax(-1) + 1
        going, before = going[~there], logs[~there, -1:]
    return found
