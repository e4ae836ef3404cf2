"""What 95% intervals are made of: the normal quantile, draws with replacement, percentiles of what these give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

Array = np.ndarray
DRAWS = 1000
"""Draws behind an interval by resampling, where nobody says how many."""
TAIL = 0.025
"""What a 95% interval leaves out on each side."""
Z = 1.959964
"""The bound of the standard normal distribution that `TAIL` exceed."""


def normal_interval(value: float, error: float) -> tuple[float, float]:
    """A number and its standard error as bounds."""
    return value - Z * error, value + Z * error


def percentile_interval(drawn: Iterable[float]) -> tuple[float, float]:
    """The bounds between which 95% of the draws lie, those without a number left out; (-inf, inf) where none is left.

    Source: Efron 1979.
    """
    kept = [x for x in drawn if math.isfinite(x)]
    low, high = np.quantile(kept, [TAIL, 1 - TAIL]) if kept else (-math.inf, math.inf)
    return float(low), float(high)


def resamples(clusters: Array, draws: int, seed: int = 0) -> Iterator[Array]:
    """The row numbers of each draw: as many clusters as there are, with replacement, each with all its rows.

    Of fewer than two clusters there are none: all would be the same rows, and say nothing of how far off these are.
    """
    order = np.argsort(clusters, kind="stable")
    _, starts = np.unique(clusters[order], return_index=True)
    rng, count = np.random.default_rng(seed), len(starts)
    members = np.split(order, starts[1:]) if count < len(order) else []
    for _ in range(draws if count > 1 else 0):
        picked = rng.integers(count, size=count)
        yield np.concatenate([members[i] for i in picked]) if members else order[picked]


def resampled_sums(rows: Array, draws: int) -> Iterator[Array]:
    """The sum over N rows [N, ...] in each of the draws, as `resamples` draws single rows.

    How often each row came is enough for it, so no row is copied, and one draw's counts are in memory at a time.
    """
    n = len(rows)
    for drawn in resamples(np.arange(n), draws):
        yield np.tensordot(np.bincount(drawn, minlength=n), rows, 1)
