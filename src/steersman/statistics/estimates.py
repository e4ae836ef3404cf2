"""Shares, correlations and calibration, with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from steersman.statistics.intervals import DRAWS, TAIL, Array, Z, percentile_interval, resamples

TINY = 1e-12
"""A variance that is rounding and no more."""
BINS = 10
"""Bins of a calibration."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval and the count behind it."""

    value: float
    low: float
    high: float
    n: int

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: what is not known is null."""
        return known(asdict(self))

    def __str__(self) -> str:
        bounds = f"{self.low:.3f} to {self.high:.3f}" if math.isfinite(self.low) else "no interval"
        return f"{self.value:.3f} ({bounds})"


def known(x: Any) -> Any:
    """The same, at any depth, with None in the place of infinite bounds and NaN, for which JSON has no word."""
    if isinstance(x, dict):
        return {k: known(v) for k, v in x.items()}
    if isinstance(x, list):
        return [known(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


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


def share(values: Array, clusters: Array) -> Estimate:
    """The mean of N values in [0, 1], such as trials won (a tie is half of one), with an interval that holds for few
    values as well; (NaN, 0, 1) of none.

    Values of one prompt hang together: `clusters` [N] names it. The interval is Clopper and Pearson's for as many
    trials as the values are worth: N / max(deff, 1) times (t_{N-1} / t_{K-1})^2 for K clusters, where deff is the
    mean's variance between clusters over that of N independent values. Where all clusters agree, they tell no
    variance: then the values of a cluster count as one and the same, which is worth (sum m)^2 / sum m^2 trials for
    clusters of m values.

    Source: Korn and Graubard 1998, Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data; Kish 1965 for clusters that agree. Departure: the latter, and deff is at least 1.
    """
    n, (names, place) = len(values), np.unique(clusters, return_inverse=True)
    if not n:
        return Estimate(math.nan, 0.0, 1.0, 0)
    p, k = float(values.mean()), len(names)
    variance = float((np.bincount(place, values - p) ** 2).sum()) / n**2 * k / max(k - 1, 1)
    if k < 2 or variance < TINY:
        trials = _alike(clusters)
    else:
        trials = n / max(variance * (n - 1) / (p * (1 - p)), 1) * (_t(n - 1) / _t(k - 1)) ** 2
    return _binomial(p, trials, n)


def ranked_share(score: Array, label: Array, clusters: Array) -> Estimate:
    """`auc` with an interval that holds for few values as well; (NaN, 0, 1) of a single label.

    As `share`, for A (1 - A) / v times (z / t_{K-1})^2 trials, where v is the variance of A over resampled clusters
    and K counts the clusters with the rarer label. Where v is 0 it is the least that N values can be worth, as many
    trials as the rarer label has, of a cluster one. The random stream is fixed.

    Source: Birnbaum and Klose 1957, Bounds for the variance of the Mann-Whitney statistic (at most A (1 - A) over the
    count of the rarer label).
    """
    value, sides = auc(score, label), [clusters[label > 0.5], clusters[~(label > 0.5)]]
    if math.isnan(value):
        return Estimate(math.nan, 0.0, 1.0, len(score))
    drawn = [auc(score[rows], label[rows]) for rows in resamples(clusters, DRAWS)]
    k, variance = min(len(np.unique(side)) for side in sides), float(np.nanvar(drawn)) if drawn else 0.0
    if k < 2 or variance < TINY:
        trials = min(_alike(side) for side in sides)
    else:
        trials = value * (1 - value) / variance * (Z / _t(k - 1)) ** 2
    return _binomial(value, trials, len(score))


def _alike(clusters: Array) -> float:
    """How many trials rows are worth of which those of a cluster say one and the same."""
    sizes = np.unique(clusters, return_counts=True)[1]
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def _t(freedom: int) -> float:
    """The bound of Student's t that 2.5% exceed."""
    return float(stats.t.ppf(1 - TAIL, freedom))


def _binomial(p: float, trials: float, n: int) -> Estimate:
    """Clopper and Pearson's interval of a share p of trials, whose number need not be whole."""
    won, lost = p * trials, (1 - p) * trials
    low = float(stats.beta.ppf(TAIL, won, lost + 1)) if won > 0 else 0.0
    high = float(stats.beta.ppf(1 - TAIL, won + 1, lost)) if lost > 0 else 1.0
    return Estimate(p, low, high, n)


def bootstrap(
    statistic: Callable[..., float], arrays: Sequence[Array], *, clusters: Array | None = None, draws: int = DRAWS
) -> Estimate:
    """A statistic of rows with the percentile interval over resampled rows, or over resampled clusters of rows.

    Rows of one prompt hang together: `clusters` [N] names the prompt. The interval is (-inf, inf) for fewer than
    two clusters, and where every draw gives the same number, for then the draws say nothing of how far off it is.
    Draws without a number are left out. The random stream is fixed.
    """
    n = len(arrays[0])
    value = float(statistic(*arrays)) if n else math.nan
    drawn = resamples(np.arange(n) if clusters is None else clusters, draws)
    low, high = percentile_interval(float(statistic(*(a[rows] for a in arrays))) for rows in drawn)
    return Estimate(value, low, high, n) if high - low > TINY else Estimate(value, -math.inf, math.inf, n)


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


def calibration(predicted: Array, outcome: Array, *, low: float = 0.0) -> Calibration:
    """`BINS` bins of [low, 1]; ECE = sum_b (n_b / N) |observed_b - predicted_b|. Empty bins are left out.

    Source: arXiv 1706.04599, eq. 3.
    """
    place = np.clip(((predicted - low) / (1 - low) * BINS).astype(int), 0, BINS - 1)
    rows = [place == b for b in range(BINS) if (place == b).any()]
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
