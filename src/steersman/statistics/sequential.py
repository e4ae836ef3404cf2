"""Means in [0, 1] that may be looked at after every value: e-values and confidence sequences by betting.

A gambler who doubts that the mean is m stakes a share k of the wealth on each value, and on average wins nothing if
it is. So the wealth is an e-value: by Ville's inequality it ever reaches 1/alpha with probability alpha at most, no
matter how often one looks or when one stops. The values of m that the gambler could not refute are the confidence
sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Array = NDArray[np.float64]

BETS: Array = np.geomspace(0.01, 0.9, 24)
"""Shares of the wealth that are staked, each by 1/24 of the capital; small ones find small effects."""
EDGE = 1e-9
"""Nearest that a mean under test comes to 0 or 1."""
PRECISION = 1e-7
"""Of bounds, which are rounded outwards."""
PIECE = 512
"""Values of every row whose wealth is in memory at a time."""


def log_wealth(x: Array, m: float) -> Array:
    """log e-value against "the mean is m" after each value of x [..., N], last axis in time; nats, same shape.

        W_t(m) = 1/(2D) sum_k [ prod_i (1 - k + k x_i / m) + prod_i (1 - k + k (1 - x_i) / (1 - m)) ]

    A nonnegative martingale that begins at 1 wherever E[x_t | all before] = m; 0 < m < 1. Half of the capital bets on
    a larger mean, half on a smaller one.

    Source: arXiv 2010.09686, eq. 23 (capital) and appendix B (a portfolio of D constant bets). Departures: the bets
    are spread geometrically, and the two halves are added where the paper's hedge takes the larger.
    """
    return _log_mean(_log_products(x, m, np.zeros((2 * len(BETS), *x.shape[:-1]))))


def _log_products(x: Array, m: float, before: Array) -> Array:
    """log of each bet's product after each value [2D, ..., N], where it was `before` [2D, ...] the first of them."""
    steps = np.stack([np.log1p(k * (ratio - 1)) for ratio in (x / m, (1 - x) / (1 - m)) for k in BETS])
    steps[..., :1] += before[..., None]
    return np.cumsum(steps, axis=-1, out=steps)


def _log_mean(logs: Array) -> Array:
    return np.logaddexp.reduce(logs, axis=0) - math.log(len(logs))


@dataclass(frozen=True, slots=True)
class Look:
    """What is known after `n` values: their mean, bounds that hold at every look at once, and the e-value."""

    n: int
    mean: float
    low: float
    high: float
    e_value: float

    def scaled(self, factor: float, shift: float) -> Look:
        """The same look at `factor * mean + shift` (factor > 0)."""
        mean, low, high = (factor * v + shift for v in (self.mean, self.low, self.high))
        return Look(self.n, mean, low, high, self.e_value)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


class Running:
    """The confidence sequence of a mean, fed one value of [0, 1] at a time.

    At a look the interval is {m: W_t(m) < 1/alpha}, cut to what earlier looks left: W_t is convex in m and at most 1
    at the sample mean, so each look's set is an interval around it. Bounds may cross where the mean drifts, which
    contradicts what the sequence supposes; `low` > `high` says so.
    """

    def __init__(self, alpha: float = 0.05, *, null: float = 0.5) -> None:
        self.alpha, self.null = alpha, null
        self.count: dict[float, int] = {}
        self.low, self.high = 0.0, 1.0

    def add(self, values: Iterable[float]) -> None:
        """Takes values in. Raises ValueError outside [0, 1]."""
        for x in values:
            if not 0 <= x <= 1:
                raise ValueError(f"{x} is not within [0, 1]")
            self.count[float(x)] = self.count.get(float(x), 0) + 1

    def look(self) -> Look:
        """The state now; each look narrows the bounds."""
        x, n = np.array(list(self.count)), np.array(list(self.count.values()), float)
        total = int(n.sum())
        if not total:
            return Look(0, math.nan, 0.0, 1.0, 1.0)
        mean = float((n * x).sum() / total)
        self.low = max(self.low, self._edge(x, n, mean, self.low, 1))
        self.high = min(self.high, self._edge(x, n, mean, self.high, -1))
        return Look(total, mean, self.low, self.high, math.exp(min(self._log_wealth(x, n, self.null), 700.0)))

    def _log_wealth(self, x: Array, n: Array, m: float) -> float:
        k = BETS[:, None]
        sums = [(n * np.log1p(k * (ratio - 1))).sum(1) for ratio in (x / m, (1 - x) / (1 - m))]
        return float(np.logaddexp.reduce(np.concatenate(sums))) - math.log(2 * len(BETS))

    def _edge(self, x: Array, n: Array, mean: float, bound: float, way: int) -> float:
        """A bound moved towards the mean, which is never refuted, as far as the values allow."""
        inside, outside = (min(max(m, EDGE), 1 - EDGE) for m in (mean, bound))
        over = lambda m: self._log_wealth(x, n, m) + math.log(self.alpha)  # noqa: E731
        if way * (mean - bound) <= 0 or over(outside) < 0:
            return bound
        root: Any = brentq(over, outside, inside, xtol=PRECISION)
        return root - way * PRECISION


def first_crossing(x: Array, alpha: float = 0.05, *, null: float = 0.5) -> NDArray[np.int64]:
    """After how many values of x [..., N] the e-value first reaches 1/alpha; 0 where it never does. Shape [...].

    Goes through `PIECE` values at a time, and leaves out the rows that have got there.
    """
    rows = x.reshape(-1, x.shape[-1])
    found, going = np.zeros(len(rows), np.int64), np.arange(len(rows))
    before = np.zeros((2 * len(BETS), len(rows)))
    for start in range(0, rows.shape[1], PIECE):
        logs = _log_products(rows[going, start : start + PIECE], null, before)
        over = _log_mean(logs) >= -math.log(alpha)
        there = over.any(-1)
        found[going[there]] = start + over[there].argmax(-1) + 1
        going, before = going[~there], logs[:, ~there, -1]
    return found.reshape(x.shape[:-1])


def refuted(x: Array, m: float, alpha: float = 0.05) -> tuple[int, int]:
    """After how many values of x [N] it is first known that their mean is above m, and that it is below m; 0 where
    it is not. What further values say takes neither back."""
    if not 0 <= m <= 1 or not len(x):
        return int(m < 0 and len(x) > 0), int(m > 1 and len(x) > 0)
    means = np.cumsum(x) / np.arange(1, len(x) + 1)
    over, before = np.zeros(len(x), bool), np.zeros(2 * len(BETS))
    for start in range(0, len(x), PIECE):
        logs = _log_products(x[start : start + PIECE], min(max(m, EDGE), 1 - EDGE), before)
        over[start : start + PIECE], before = _log_mean(logs) >= -math.log(alpha), logs[:, -1]
    above, below = (
        int(there.argmax()) + 1 if there.any() else 0 for there in (over & (means > m), over & (means < m))
    )
    return above, below


def arm_difference(
    x: Array, treated: NDArray[np.bool_], share: float, *, centre: float | None = None
) -> tuple[Array, float]:
    """Values in [0, 1] whose mean is that of the difference between two arms, and the scale to read it with.

    User i, in order, was put into the treated arm with probability `share` and had the outcome x_i in [0, 1]:

        z_i = (x_i - c_i) (1{treated} / share - 1{not} / (1 - share)),   E[z_i | all before] = mu_1 - mu_0

    with c_i the mean outcome of the users before (1/2 for the first), or `centre` in [0, 1] for all, which makes the
    variance small and keeps z within [-r, r], r = 1 / min(share, 1 - share). Given are (z / r + 1) / 2 and r: a
    difference d is the mean (d / r + 1) / 2, none is 1/2.

    Source: arXiv 2210.10768, section 3 (bounded importance-weighted betting with a predictable centre).
    """
    before = (0.5 + np.concatenate([[0.0], np.cumsum(x)])[:-1]) / (1 + np.arange(len(x)))
    r = 1 / min(share, 1 - share)
    z = (x - (before if centre is None else centre)) * np.where(treated, 1 / share, -1 / (1 - share))
    return (z / r + 1) / 2, r


def user_scores(users: Sequence[str], values: Sequence[float], per_user: int = 1) -> tuple[list[int], Array]:
    """One value a user: the mean of the first `per_user` values of each, at the place where the last of them came.

    One user's values hang together, and a running mean of them may be stopped where it looks well; a mean of a number
    chosen beforehand may not. Users with fewer values are not in it. Given are the places, rising, and the scores.
    """
    seen: dict[str, list[float]] = {}
    places, scores = [], []
    for place, (user, x) in enumerate(zip(users, values, strict=True)):
        own = seen.setdefault(user, [])
        own.append(x)
        if len(own) == per_user:
            places.append(place)
            scores.append(sum(own) / per_user)
    return places, np.array(scores, float)
