"""What the health checks ask of a run's history: the numbers of each iteration, oldest first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

Row = dict[str, float]


def last_of(history: list[Row], key: str, n: int) -> list[float] | None:
    """The last n values of a key, as many as there are; None where the newest row has none."""
    if key not in history[-1]:
        return None
    return list(islice((row[key] for row in reversed(history) if key in row), n))[::-1]


def start_of(history: list[Row], key: str) -> float | None:
    """The mean of the first three values of a key; None where there is none."""
    first = list(islice((row[key] for row in history if key in row), 3))
    return sum(first) / len(first) if first else None


def now_of(history: list[Row], key: str, n: int) -> float | None:
    """The mean of the last n values of a key; None where the newest row has none."""
    last = last_of(history, key, n)
    return sum(last) / len(last) if last else None


def parted(
    pairs: list[tuple[float, float]], n: int, sigma: float
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Whether the first rose and the second fell, both by `sigma` standard errors, since the second was highest.

    Means over n rows, Welch's standard error. Gives ((first then, first now), (second then, second now)).
    """
    if len(pairs) < 2 * n:
        return None
    now = pairs[-n:]
    windows = [pairs[i : i + n] for i in range(len(pairs) - 2 * n + 1)]
    then = max(windows, key=lambda w: sum(second for _, second in w))
    rise = _welch([a for a, _ in then], [a for a, _ in now])
    fall = _welch([b for _, b in now], [b for _, b in then])
    if rise <= sigma or fall <= sigma:
        return None
    return (_mean([a for a, _ in then]), _mean([a for a, _ in now])), (
        _mean([b for _, b in then]),
        _mean([b for _, b in now]),
    )


def average_of(rows: list[Row], key: str) -> float:
    """The mean of a key over the rows that have it; NaN where none has."""
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else math.nan


def _mean(x: Sequence[float]) -> float:
    return sum(x) / len(x)


def _welch(low: Sequence[float], high: Sequence[float]) -> float:
    """(mean of `high` - mean of `low`) in standard errors of that difference."""
    difference = _mean(high) - _mean(low)
    error = math.sqrt(sum(_variance(x) / len(x) for x in (low, high)))
    return difference / max(error, 1e-12)


def _variance(x: Sequence[float]) -> float:
    return sum((v - _mean(x)) ** 2 for v in x) / (len(x) - 1)
