"""Ratings from battles: Bradley-Terry by maximum likelihood on the scale of Elo, with bootstrap intervals.

Plain ones are here; those with style held equal are in `style.py`, and share the fit and its prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.statistics.estimates import known
from steersman.statistics.intervals import percentile_interval, resamples

Array = NDArray[np.float64]

SCALE = 400 / np.log(10)
"""Elo points per nat: 400 points are odds of 10 to 1."""
AT = 1000.0
"""Points of the anchor."""
PRIOR = 0.5
"""Battles that every player has won, and as many lost, against the mean of all."""
FAINT = 0.01
"""What is left of that prior in draws that have prior battles of their own."""


@dataclass(frozen=True, slots=True)
class Battle:
    """`share` of the first player: 1 won, 0 lost, 0.5 tied; `group` (a prompt, a user) is resampled as one; `style`
    is how the two answers differ in each feature of style, where that is known (`style.py`)."""

    first: str
    second: str
    share: float
    group: int = 0
    style: tuple[float, ...] = ()


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


def ratings(battles: Sequence[Battle], *, anchor: str, draws: int = 300, seed: int = 0) -> list[Rating]:
    """P(i beats j) = 1 / (1 + exp(theta_j - theta_i)), fitted; best first, `anchor` fixed at `AT` points.

    A tie is half a battle won and half a battle lost. Every player has `PRIOR` battles won and as many lost
    against the mean of all, which keeps one who won (or lost) everything finite. Intervals are the quantiles of
    `draws` fits to groups drawn with replacement; of a single group there is none, and of the anchor, the yardstick,
    it is `AT` to `AT`. Of a player whose groups all say the same (all won, all tied) draws with replacement would say
    it again, so its interval is that of `prior_battles`; where the anchor is such a player, every interval is.

    Source: arXiv 2403.04132, section 3 (Bradley-Terry with bootstrap). Departures: the prior, and `prior_battles`.
    """
    players = sorted({name for b in battles for name in (b.first, b.second)} | {anchor})
    place = {name: i for i, name in enumerate(players)}
    fought, groups, zero = fought_rows(battles, place), np.array([b.group for b in battles]), place[anchor]

    def fit(rows: Array, weight: Array | float = 1.0, prior: float = PRIOR) -> Array:
        theta = bradley_terry(wins_of(rows, len(players), weight), prior)
        return AT + SCALE * (theta - theta[zero])

    drawn = [fit(fought[rows]) for rows in resamples(groups, draws, seed)]
    point, bounds = fit(fought), intervals(drawn, len(players))
    same = of_one_mind(fought, groups, len(players))
    if drawn and same.any():
        more = prior_battles(fought, groups, same)
        rows, prior = np.concatenate([fought, more.rows]), FAINT * PRIOR
        wide = intervals([fit(rows, w, prior) for w in more.weights(groups, draws, seed)], len(players))
        bounds = [around(point[i], wide[i]) if same[i] or same[zero] else x for i, x in enumerate(bounds)]
    bounds[zero] = AT, AT
    told = [Rating(name, float(point[i]), *bounds[i], int((fought[:, :2] == i).sum())) for name, i in place.items()]
    return sorted(told, key=lambda r: -r.rating)


def intervals(drawn: Sequence[Array], count: int) -> list[tuple[float, float]]:
    """The 95% interval of each of `count` numbers; (-inf, inf) without draws."""
    return [percentile_interval(float(one[i]) for one in drawn) for i in range(count)]


def around(point: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """The interval, widened to the point where that lies outside."""
    return min(float(point), bounds[0]), max(float(point), bounds[1])


def fought_rows(battles: Sequence[Battle], place: dict[str, int]) -> Array:
    """The battles as rows of (i, j, share of i)."""
    return np.array([(place[b.first], place[b.second], b.share) for b in battles], float).reshape(-1, 3)


def of_one_mind(fought: Array, groups: Array, count: int) -> NDArray[np.bool_]:
    """Which players have the same mean share in each of the groups that they fought in."""
    same = np.zeros(count, dtype=bool)
    for i in range(count):
        share, group = _own(fought, groups, i)
        size = np.bincount(group)
        same[i] = len(size) > 0 and np.ptp(np.bincount(group, share) / size) < 1e-9
    return same


def _own(fought: Array, groups: Array, player: int) -> tuple[Array, NDArray[np.int64]]:
    """The player's share of each of its battles, and which of its groups that was in, counted from 0."""
    first, second = fought[:, 0] == player, fought[:, 1] == player
    own = first != second
    return np.where(first, fought[:, 2], 1 - fought[:, 2])[own], np.unique(groups[own], return_inverse=True)[1]


@dataclass(frozen=True, slots=True)
class PriorBattles:
    """`rows` of (i, j, share of i); the weight of each is a Gamma variable of `shape`, times `size`."""

    rows: Array
    shape: Array
    size: Array

    def weights(self, groups: Array, draws: int, seed: int) -> Iterator[Array]:
        """For each draw the weights of the battles, an Exponential one for each of `groups`, then those of `rows`."""
        names, place = np.unique(groups, return_inverse=True)
        rng = np.random.default_rng((seed, 1))
        for _ in range(draws):
            yield np.concatenate([rng.exponential(size=len(names))[place], rng.gamma(self.shape) * self.size])


def prior_battles(fought: Array, groups: Array, same: NDArray[np.bool_]) -> PriorBattles:
    """What widens the draws of the players that are `same`: each has further battles, won ones and lost ones, against
    the opponents that it met, as often as it met them.

    The battles of one group are taken to say one thing, so a prior battle is as large as a group: sum m^2 / sum m for
    groups of m battles. The weights of the won ones and of the lost ones add up to Gamma(PRIOR) times that. For two
    players and groups of one battle the share of a player that won all n then has the distribution Beta(n + 1, 1),
    what a uniform prior says of it; the interval narrows as 1 / n.

    Source: Rubin 1981, The Bayesian Bootstrap. Departure: the prior battles, which stand for outcomes not yet seen.
    """
    found: list[list[float]] = []
    for i in np.flatnonzero(same).tolist():
        size = np.bincount(_own(fought, groups, i)[1])
        met = np.concatenate([fought[fought[:, 0] == i, 1], fought[fought[:, 1] == i, 0]])
        others, times = np.unique(met[met != i], return_counts=True)
        as_one = float((size**2).sum() / size.sum())
        for j, part in zip(others.tolist(), (times / times.sum()).tolist(), strict=True):
            found += [[i, j, share, PRIOR * part, as_one] for share in (1.0, 0.0)]
    made = np.array(found, float).reshape(-1, 5)
    return PriorBattles(made[:, :3], made[:, 3], made[:, 4])


def wins_of(rows: Array, count: int, weight: Array | float = 1.0) -> Array:
    """wins[i, j]: battles that i won against j, a tie half, from rows of (i, j, share of i) that count `weight`."""
    wins = np.zeros((count, count))
    first, second = rows[:, 0].astype(int), rows[:, 1].astype(int)
    np.add.at(wins, (first, second), weight * rows[:, 2])
    np.add.at(wins, (second, first), weight * (1 - rows[:, 2]))
    return wins


def bradley_terry(wins: Array, prior: float = PRIOR) -> Array:
    """argmax_theta sum_ij wins_ij log sigmoid(theta_i - theta_j) + `prior_value`; theta in nats."""
    battles = wins + wins.T

    def value(theta: Array) -> float:
        gap = theta[:, None] - theta[None, :]
        return float(-(wins * np.logaddexp(0, -gap)).sum()) + prior_value(theta, prior)

    def slopes(theta: Array) -> tuple[Array, Array]:
        p, (gradient, curve) = 1 / (1 + np.exp(theta[None, :] - theta[:, None])), prior_slopes(theta, prior)
        weight = battles * p * (1 - p)
        return (wins - battles * p).sum(1) + gradient, np.diag(weight.sum(1) + curve) - weight

    return maximum(value, slopes, len(wins))


def prior_value(theta: Array, prior: float = PRIOR) -> float:
    """prior sum_i [log sigmoid(theta_i) + log sigmoid(-theta_i)], which is highest where all are equal to 0."""
    return float(-prior * (np.logaddexp(0, -theta) + np.logaddexp(0, theta)).sum())


def prior_slopes(theta: Array, prior: float = PRIOR) -> tuple[Array, Array]:
    """The first derivative of `prior_value` by each theta, and less the second one."""
    own = 1 / (1 + np.exp(-theta))
    return prior * (1 - 2 * own), 2 * prior * own * (1 - own)


def maximum(value: Callable[[Array], float], slopes: Callable[[Array], tuple[Array, Array]], size: int) -> Array:
    """Where a concave function of `size` numbers is highest, by Newton's method with halved steps, from 0.

    `slopes` gives its gradient [size] and its negative Hessian [size, size].
    """
    x = np.zeros(size)
    for _ in range(100):
        gradient, hessian = slopes(x)
        step, part = np.linalg.solve(hessian, gradient), 1.0
        while part > 1e-6 and value(x + part * step) < value(x):
            part /= 2
        x = x + part * step
        if np.abs(step).max() < 1e-9:
            break
    return x
