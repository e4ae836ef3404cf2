"""How many values a test needs: fixed beforehand, or looked at after every one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from steersman.statistics.sequential import Array, first_crossing


@dataclass(frozen=True, slots=True)
class Plan:
    """Values that a sequential test needs to see an effect: in half of experiments, and in `power` of them.

    `fixed` is what a test at one size chosen beforehand needs for the same power; it may be looked at once only.
    """

    effect: float
    power: float
    alpha: float
    median: int
    needed: int
    fixed: int

    def __str__(self) -> str:
        return (
            f"to see {0.5 + self.effect:.3f} with {self.power:.0%} power: at most {self.needed:,} values (half the "
            f"time at most {self.median:,}); a test looked at once, at the end, needs {self.fixed:,}"
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
    rng = np.random.default_rng(seed)
    win = (1 - ties) / 2 + effect
    sd = math.sqrt(win + ties / 4 - (0.5 + effect) ** 2)
    fixed = fixed_size(effect, max(sd, 1e-3), alpha=alpha, power=power)
    length = max(60, 3 * fixed)
    while True:
        parts = [first_crossing(outcomes(effect, ties, (50, length), rng), alpha) for _ in range(max(runs // 50, 1))]
        found = np.concatenate(parts)
        stopped = np.sort(np.where(found == 0, np.iinfo(np.int64).max, found))
        median, needed = (int(stopped[math.ceil(q * len(stopped)) - 1]) for q in (0.5, power))
        if needed <= length:
            return Plan(effect, power, alpha, median, needed, fixed)
        length *= 2
