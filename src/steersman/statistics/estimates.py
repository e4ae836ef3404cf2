"""Shares, correlations and calibration, with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

Array = np.ndarray
Z = 1.959964


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval and the count behind it."""

    value: float
    low: float
    high: float
    n: int

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def wilson(right: float, n: int) -> Estimate:
    """A share of independent trials with Wilson's interval; (NaN, 0, 1) of none.

    Source: Wilson 1927.
    """
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    p = right / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return Estimate(p, centre - half, centre + half, n)


def bootstrap(
    statistic: Callable[..., float], arrays: Sequence[Array], *, clusters: Array | None = None, draws: int = 1000
) -> Estimate:
    """A statistic of rows with the percentile interval over resampled rows, or over resampled clusters of rows.

    Rows of one prompt hang together: `clusters` [N] names the prompt. The interval is (-inf, inf) for fewer than
    two clusters, and draws without a number are left out. The random stream is fixed.
    """
    n = len(arrays[0])
    value = float(statistic(*arrays)) if n else math.nan
    if (n if clusters is None else len(np.unique(clusters))) < 2:
        return Estimate(value, -math.inf, math.inf, n)
    drawn = resamples(np.arange(n) if clusters is None else clusters, draws)
    seen = [float(statistic(*(a[rows] for a in arrays))) for rows in drawn]
    kept = [x for x in seen if math.isfinite(x)]
    low, high = np.percentile(kept, [2.5, 97.5]) if kept else (-math.inf, math.inf)
    return Estimate(value, float(low), float(high), n)


def resamples(clusters: Array, draws: int, seed: int = 0) -> Iterator[Array]:
    """The row numbers of each draw: as many clusters as there are, with replacement, each with all its rows."""
    order = np.argsort(clusters, kind="stable")
    _, starts = np.unique(clusters[order], return_index=True)
    members, rng = np.split(order, starts[1:]), np.random.default_rng(seed)
    for _ in range(draws if len(order) else 0):
        picked = rng.integers(len(members), size=len(members))
        yield order[picked] if len(members) == len(order) else np.concatenate([members[i] for i in picked])


def mean(x: Array) -> float:
    return float(np.mean(x)) if len(x) else math.nan


def pearson(x: Array, y: Array) -> float:
    """Linear correlation; NaN where either side does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Array, y: Array) -> float:
    """Correlation of ranks, ties sharing their mean rank; NaN where either side does not vary."""
    return pearson(stats.rankdata(x), stats.rankdata(y)) if len(x) > 1 else math.nan


def kendall(x: Array, y: Array) -> float:
    """Kendall's tau-b; NaN where either side does not vary."""
    result: Any = stats.kendalltau(x, y)
    return float(result.statistic)


def rmse(x: Array, y: Array) -> float:
    return float(np.sqrt(np.mean((x - y) ** 2)))


def auc(score: Array, label: Array) -> float:
    """P(a positive scores above a negative), ties counting half; labels above 1/2 are positive. NaN for one class."""
    positive = label > 0.5
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        return math.nan
    return float((stats.rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * m))


@dataclass(frozen=True, slots=True)
class Calibration:
    """Predicted probability and observed share in bins of equal width, and the expected calibration error."""

    predicted: list[float]
    observed: list[float]
    count: list[int]
    ece: float


def calibration(predicted: Array, outcome: Array, *, low: float = 0.0, bins: int = 10) -> Calibration:
    """Bins of [low, 1]; ECE = sum_b (n_b / N) |observed_b - predicted_b|. Empty bins are left out.

    Source: arXiv 1706.04599, eq. 3.
    """
    place = np.clip(((predicted - low) / (1 - low) * bins).astype(int), 0, bins - 1)
    rows = [place == b for b in range(bins) if (place == b).any()]
    mean_predicted, mean_observed = [mean(predicted[r]) for r in rows], [mean(outcome[r]) for r in rows]
    count = [int(r.sum()) for r in rows]
    gaps = [n * abs(a - b) for n, a, b in zip(count, mean_predicted, mean_observed, strict=True)]
    return Calibration(mean_predicted, mean_observed, count, sum(gaps) / max(sum(count), 1))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p-values: the i-th smallest of m times m - i + 1, never below the one before, at most 1.

    Rejecting where it is below alpha keeps the chance of any false rejection below alpha. Source: Holm 1979.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    out, before = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        out[i] = before = max(before, min(1.0, (len(p) - rank) * p[i]))
    return out
