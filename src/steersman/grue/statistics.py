"""Means over seeds with Student's intervals, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean over seeds and half the width of its interval; `half` is None where there is one seed alone.

    half = t_{0.975, n - 1} s / sqrt(n)
    """

    value: float
    half: float | None
    count: int

    @property
    def sign(self) -> str:
        """ "higher", "lower", "not told apart" (the interval holds 0), or "one seed"; of a difference."""
        if self.half is None:
            return "one seed"
        if abs(self.value) <= self.half:
            return "not told apart"
        return "higher" if self.value > 0 else "lower"


def mean(values: Sequence[float]) -> Mean | None:
    """None where there is no value."""
    n = len(values)
    if n == 0:
        return None
    if n == 1:
        return Mean(values[0], None, 1)
    spread = statistics.stdev(values) / math.sqrt(n)
    return Mean(statistics.fmean(values), float(student.ppf((1 + LEVEL) / 2, n - 1)) * spread, n)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Mean | None:
    """Ours minus theirs over the seeds that both have, paired: a seed's cells answer with the same random streams."""
    return mean([ours[s] - theirs[s] for s in ours if s in theirs])
