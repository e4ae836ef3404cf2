"""Ratings from battles: Bradley-Terry by maximum likelihood on the scale of Elo, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.statistics.estimates import known, resamples

SCALE = 400 / np.log(10)
"""Elo points per nat: 400 points are odds of 10 to 1."""


@dataclass(frozen=True, slots=True)
class Battle:
    """`share` of the first player: 1 won, 0 lost, 0.5 tied; `group` (a prompt, a user) is resampled as one."""

    first: str
    second: str
    share: float
    group: int = 0


@dataclass(frozen=True, slots=True)
class Rating:
    """Elo points with the bounds of the interval (-inf and inf where there is none), and battles fought."""

    player: str
    rating: float
    low: float
    high: float
    battles: int

    @property
    def interval(self) -> str:
        return f"{self.low:.0f} to {self.high:.0f}" if math.isfinite(self.low) else "–"

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: bounds that are not known are null."""
        return known(asdict(self))


def ratings(
    battles: Sequence[Battle], *, anchor: str, at: float = 1000.0, prior: float = 0.5, draws: int = 300,
    level: float = 0.95, seed: int = 0,
) -> list[Rating]:  # fmt: skip
    """P(i beats j) = 1 / (1 + exp(theta_j - theta_i)), fitted; best first, `anchor` fixed at `at` points.

    A tie is half a battle won and half a battle lost. Every player has `prior` battles won and as many lost
    against the mean of all, which keeps one who won (or lost) everything finite. Intervals are the quantiles of
    `draws` fits to groups drawn with replacement; of a single group there is none, and of the anchor, the yardstick,
    it is `at` to `at`.

    Source: arXiv 2403.04132, section 3 (Bradley-Terry with bootstrap). Departure: the prior.
    """
    players = sorted({name for b in battles for name in (b.first, b.second)} | {anchor})
    place = {name: i for i, name in enumerate(players)}
    fought = np.zeros((len(battles), 3))
    for row, b in enumerate(battles):
        fought[row] = place[b.first], place[b.second], b.share
    zero = place[anchor]

    def fit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        theta = bradley_terry(wins_of(rows, len(players)), prior)
        return at + SCALE * (theta - theta[zero])

    drawn = [fit(fought[rows]) for rows in resamples(np.array([b.group for b in battles]), draws, seed)]
    point, bounds = fit(fought), intervals(drawn, len(players), level)
    bounds[zero] = at, at
    told = [Rating(name, float(point[i]), *bounds[i], int((fought[:, :2] == i).sum())) for name, i in place.items()]
    return sorted(told, key=lambda r: -r.rating)


def intervals(drawn: Sequence[NDArray[np.float64]], count: int, level: float = 0.95) -> list[tuple[float, float]]:
    """Of each of `count` numbers the quantiles between which `level` of the draws lie; (-inf, inf) without draws."""
    if not drawn:
        return [(-math.inf, math.inf)] * count
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def wins_of(rows: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """wins[i, j]: battles that i won against j, a tie half, from rows of (i, j, share of i)."""
    wins = np.zeros((count, count))
    first, second = rows[:, 0].astype(int), rows[:, 1].astype(int)
    np.add.at(wins, (first, second), rows[:, 2])
    np.add.at(wins, (second, first), 1 - rows[:, 2])
    return wins


def bradley_terry(wins: NDArray[np.float64], prior: float = 0.0, steps: int = 100) -> NDArray[np.float64]:
    """argmax_theta sum_ij wins_ij log sigmoid(theta_i - theta_j) + prior sum_i [log sigmoid(theta_i) + log
    sigmoid(-theta_i)], by Newton's method with halved steps; theta in nats, mean 0 without a prior."""
    n, theta = len(wins), np.zeros(len(wins))
    battles = wins + wins.T

    def value(x: NDArray[np.float64]) -> float:
        gap = x[:, None] - x[None, :]
        return float(-(wins * np.logaddexp(0, -gap)).sum() - prior * (np.logaddexp(0, -x) + np.logaddexp(0, x)).sum())

    for _ in range(steps):
        p = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
        own = 1 / (1 + np.exp(-theta))
        gradient = (wins - battles * p).sum(1) + prior * (1 - 2 * own)
        weight = battles * p * (1 - p)
        # The ones fix the direction that battles say nothing about, a shift of all.
        hessian = (
            np.diag(weight.sum(1) + 2 * prior * own * (1 - own)) - weight + (np.ones((n, n)) / n if not prior else 0)
        )
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while size > 1e-6 and value(theta + size * step) < value(theta):
            size /= 2
        theta = theta + size * step
        if np.abs(step).max() < 1e-10:
            break
    return theta - theta.mean() if not prior else theta
