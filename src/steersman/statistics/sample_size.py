"""How many values a test needs: fixed beforehand, or looked at after every one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from steersman.statistics.sequential import Array, arm_difference, first_crossing


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


def plan(
    effect: float, *, ties: float = 0.0, alpha: float = 0.05, power: float = 0.8, runs: int = 400, seed: int = 0
) -> Plan:
    """The size of a win-rate test that is looked at after every value, by simulating `runs` experiments.

    `effect` is the win rate's distance from 1/2, in (0, (1 - ties) / 2]. Raises ValueError outside it.
    """
    if not 0 < effect <= (1 - ties) / 2:
        raise ValueError(f"an effect of {effect} does not fit a share of ties of {ties}")
    win = (1 - ties) / 2 + effect
    sd = math.sqrt(win + ties / 4 - (0.5 + effect) ** 2)
    fixed = fixed_size(effect, max(sd, 1e-3), alpha=alpha, power=power)
    median, needed = _sizes(lambda shape, rng: outcomes(effect, ties, shape, rng), fixed, alpha, power, runs, seed)
    return Plan(f"a win rate of {0.5 + effect:.3f}", effect, power, alpha, median, needed, fixed)


def plan_arms(
    rate: float, effect: float, *, share: float = 0.5, alpha: float = 0.05, power: float = 0.8, runs: int = 400,
    seed: int = 0,
) -> Plan:  # fmt: skip
    """The same in users of both arms together, for a yes or no of each: `rate` in the control, `rate + effect` in the
    treatment, which a `share` of users meets. Raises ValueError where these are no shares."""
    better = rate + effect
    if not (0 <= rate <= 1 and 0 <= better <= 1 and effect):
        raise ValueError(f"rates of {rate} and {better} are no two different shares")
    spread = math.sqrt(rate * (1 - rate) / (1 - share) + better * (1 - better) / share)
    fixed = fixed_size(effect, max(spread, 1e-3), alpha=alpha, power=power)

    def draw(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        treated = rng.random(shape) < share
        x = (rng.random(shape) < np.where(treated, better, rate)).astype(float)
        return np.stack([arm_difference(values, t, share)[0] for values, t in zip(x, treated, strict=True)])

    median, needed = _sizes(draw, fixed, alpha, power, runs, seed)
    return Plan(f"{better:.3f} instead of {rate:.3f}", effect, power, alpha, median, needed, fixed)


def _sizes(
    draw: Callable[[tuple[int, ...], np.random.Generator], Array], fixed: int, alpha: float, power: float, runs: int,
    seed: int,
) -> tuple[int, int]:  # fmt: skip
    """After how many values half of the experiments, and `power` of them, have ended."""
    rng, length = np.random.default_rng(seed), max(60, 3 * fixed)
    while True:
        parts = [first_crossing(draw((50, length), rng), alpha) for _ in range(max(runs // 50, 1))]
        found = np.concatenate(parts)
        stopped = np.sort(np.where(found == 0, np.iinfo(np.int64).max, found))
        median, needed = (int(stopped[math.ceil(q * len(stopped)) - 1]) for q in (0.5, power))
        if needed <= length:
            return median, needed
        length *= 2
