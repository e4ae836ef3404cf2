"""What the health checks ask of a run's history, kept in a size that does not grow with the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Row = dict[str, float]
FIRST = 5
"""Values of each number that are kept from its start."""


@dataclass
class Series:
    """One number over the iterations: its first few values, its last few, how many there were, and its extremes."""

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    count: int = 0
    low: float = math.inf
    high: float = -math.inf

    def add(self, value: float, length: int) -> None:
        """`length` is how many of the last values stay."""
        if len(self.first) < FIRST:
            self.first.append(value)
        self.last.append(value)
        del self.last[:-length]
        self.count += 1
        self.low, self.high = min(self.low, value), max(self.high, value)


@dataclass
class Divergence:
    """Two numbers side by side: the last 2n pairs, and the n pairs in a row whose second was highest in the mean, of
    all that ended n pairs ago or earlier."""

    last: list[tuple[float, float]] = field(default_factory=list)
    best: list[tuple[float, float]] = field(default_factory=list)

    def add(self, pair: tuple[float, float], n: int) -> None:
        self.last.append(pair)
        del self.last[: -2 * n]
        if len(self.last) == 2 * n and (not self.best or _second(self.last[:n]) > _second(self.best)):
            self.best = self.last[:n]

    def diverged(self, n: int, sigma: float) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Whether the first rose and the second fell, both by `sigma` standard errors, since the second was highest.

        Means over n rows, Welch's standard error. Gives ((first then, first now), (second then, second now)).
        """
        if not self.best:
            return None
        (a0, b0), (a1, b1) = (([a for a, _ in pairs], [b for _, b in pairs]) for pairs in (self.best, self.last[-n:]))
        if _welch(a0, a1) <= sigma or _welch(b1, b0) <= sigma:
            return None
        return (_mean(a0), _mean(a1)), (_mean(b0), _mean(b1))


class History:
    """The numbers of every iteration, as far as the checks need them: each step costs the same, however late.

    The last `length` values of each number stay, and `window` pairs of rewards are compared (`Divergence`).
    """

    def __init__(self, *, length: int, window: int) -> None:
        self.length, self.window = max(length, FIRST), window
        self.latest: Row = {}
        self.series: dict[str, Series] = {}
        self.partings: dict[str, Divergence] = {}

    def add(self, row: Row) -> None:
        """The numbers of one more iteration."""
        self.latest = row
        for key, value in row.items():
            self.series.setdefault(key, Series()).add(value, self.length)
            if key.startswith("reward/") and key != "reward/total" and "reward/total" in row:
                self.partings.setdefault(key, Divergence()).add((row["reward/total"], value), self.window)

    def of(self, key: str) -> Series:
        """All that is known of a number; an empty series where it was never seen."""
        return self.series.get(key, Series())

    def last(self, key: str, n: int) -> list[float] | None:
        """The last n values of a key, as many as there are; None where the newest row has none."""
        return self.of(key).last[-n:] if key in self.latest else None

    def start(self, key: str) -> float | None:
        """The mean of the first three values of a key; None where there is none."""
        first = self.of(key).first[:3]
        return _mean(first) if first else None

    def recent_mean(self, key: str, n: int) -> float | None:
        """The mean of the last n values of a key; None where the newest row has none."""
        last = self.last(key, n)
        return _mean(last) if last else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "latest": dict(self.latest),
            "series": {key: asdict(x) for key, x in self.series.items()},
            "partings": {key: asdict(x) for key, x in self.partings.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.latest = dict(state["latest"])
        self.series = {key: Series(**x) for key, x in state["series"].items()}
        self.partings = {
            key: Divergence(**{name: [tuple(pair) for pair in pairs] for name, pairs in x.items()})
            for key, x in state["partings"].items()
        }


def mean_or_nan(x: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return _mean(x) if x else math.nan


def _second(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(b for _, b in pairs)


def _mean(x: Sequence[float]) -> float:
    return sum(x) / len(x)


def _welch(low: Sequence[float], high: Sequence[float]) -> float:
    """(mean of `high` - mean of `low`) in standard errors of that difference."""
    difference = _mean(high) - _mean(low)
    error = math.sqrt(sum(_variance(x) / len(x) for x in (low, high)))
    return difference / max(error, 1e-12)


def _variance(x: Sequence[float]) -> float:
    return sum((v - _mean(x)) ** 2 for v in x) / (len(x) - 1)
