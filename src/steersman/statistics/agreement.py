"""How far raters agree beyond chance."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from steersman.statistics.estimates import TINY, Estimate
from steersman.statistics.intervals import DRAWS, TAIL, Array, percentile_interval, resampled_sums

Metric = Literal["nominal", "ordinal", "interval"]
Rated = tuple[str, float]
"""(unit, value): what one rater said of one unit."""
Labels = Sequence[str] | Array


def alpha(ratings: Iterable[Rated], metric: Metric = "nominal") -> Estimate:
    """Krippendorff's alpha with a 95% percentile interval over resampled units.

    alpha = 1 - (n - 1) sum_{c<k} o_ck d_ck / sum_{c<k} n_c n_k d_ck, where o_ck counts the pairs of values within
    units, each unit's weighted by 1 / (m_u - 1), and d is 1 for different values (nominal), (c - k)^2 (interval) or
    (sum_{g=c}^{k} n_g - (n_c + n_k) / 2)^2 (ordinal). Units with one value do not count; NaN where no value differs.
    `n` of the estimate is the number of units with two values or more. The random stream is fixed.

    Where every draw gives the same alpha (all units agree), the bounds are what it would be if a share q of the units
    were rated by chance (alpha 0), or in full agreement (1); q = 1 - 0.025^(1 / n) is the most that n units without
    such a one leave open (Clopper and Pearson 1934).

    Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section E.
    """
    units: dict[str, list[float]] = defaultdict(list)
    for unit, value in ratings:
        units[unit].append(value)
    values = sorted({v for got in units.values() if len(got) > 1 for v in got})
    place = {v: i for i, v in enumerate(values)}
    tables = np.array([_coincidences([place[v] for v in got], len(values)) for got in units.values() if len(got) > 1])
    if not len(tables):
        return Estimate(math.nan, -math.inf, math.inf, 0)
    of = lambda table: _alpha(table, np.array(values), metric)  # noqa: E731
    value, (low, high) = of(tables.sum(0)), percentile_interval(map(of, resampled_sums(tables, DRAWS)))
    if high - low < TINY:
        q = 1 - TAIL ** (1 / len(tables))
        low, high = (1 - q) * value + q * min(value, 0.0), (1 - q) * value + q
    return Estimate(value, low, high, len(tables))


def cohen_kappa(first: Labels, second: Labels) -> float:
    """Cohen's kappa of two labellings of the same N units: (p_o - p_e) / (1 - p_e), p_o the share of units with equal
    labels and p_e what it would be by chance, from each rater's own shares of the labels.

    NaN where both give one and the same label throughout (p_e = 1), and of no units.

    Source: Cohen 1960, eq. 1.
    """
    a, b = np.array(list(first)), np.array(list(second))
    if not len(a):
        return math.nan
    expected = float(sum((a == label).mean() * (b == label).mean() for label in np.union1d(a, b)))
    return (float((a == b).mean()) - expected) / (1 - expected) if expected < 1 else math.nan


def _coincidences(got: list[int], size: int) -> np.ndarray:
    """Ordered pairs of one unit's values, [size, size], divided by its count less one."""
    count = np.bincount(got, minlength=size).astype(float)
    return (np.outer(count, count) - np.diag(count)) / (len(got) - 1)


def _alpha(table: np.ndarray, values: np.ndarray, metric: Metric) -> float:
    margin = table.sum(1)
    distance = _DISTANCES[metric](values, margin)
    expected = float((np.outer(margin, margin) * distance).sum())
    if expected == 0:
        return math.nan
    return 1 - (margin.sum() - 1) * float((table * distance).sum()) / expected


def _nominal(values: np.ndarray, margin: np.ndarray) -> np.ndarray:
    return 1.0 - np.eye(len(values))


def _interval(values: np.ndarray, margin: np.ndarray) -> np.ndarray:
    return (values[:, None] - values[None]) ** 2


def _ordinal(values: np.ndarray, margin: np.ndarray) -> np.ndarray:
    middle = np.cumsum(margin) - margin / 2  # the mean rank of each value
    return (middle[:, None] - middle[None]) ** 2


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "nominal": _nominal, "interval": _interval, "ordinal": _ordinal,
}  # fmt: skip
