"""One row of data, what can be wrong with it, and the count of those left out."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from steersman.types import SteersmanError


class RowError(SteersmanError):
    """One row that can not be used; `reason` is the short name under which skipped rows are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True)
class BadRows:
    """What to do with a bad row: stop at once, or skip it and keep count by reason.

    `counts` says how many rows were skipped for each reason, `first` holds the first message of each. `nulls` counts
    values inside tool calls that only the container's one schema for all rows made null; they are dropped. `key` is
    the recipe's key for the policy; None where it has none.
    """

    policy: Literal["stop", "skip"] = "stop"
    key: str | None = "data.on_bad_row"
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    nulls: int = 0

    def add(self, bad: RowError) -> None:
        if self.policy == "stop":
            choice = f" ({self.key}: skip leaves such rows out and counts them)" if self.key else ""
            raise RowError(bad.reason, f"{bad}{choice}") from bad
        self.note(bad.reason, str(bad))

    def note(self, reason: str, message: str) -> None:
        """Count a row that is left out because the recipe says so."""
        self.counts[reason] += 1
        self.first.setdefault(reason, message)

    @property
    def sentence(self) -> str:
        if not self.counts:
            return "no row left out"
        parts = ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())
        return f"{self.counts.total()} rows left out: {parts}"


@dataclass(slots=True)
class Row:
    """One row of data: `number` counts lines (JSONL, CSV, text) or rows (JSON, Parquet, hub) from 1.

    `names` maps a canonical column to the user's own name for it, so that errors speak the user's language. `part` is
    the place of its path in the recipe, where sets are mixed.
    """

    data: dict[str, Any]
    file: str
    number: int
    unit: str = "row"
    names: dict[str, str] = field(default_factory=dict)
    part: int = 0

    def where(self, column: str | None = None) -> str:
        place = f"{self.file}, {self.unit} {self.number}"
        return place if column is None else f"{place}, field {self.names.get(column, column)!r}"

    def fault(self, reason: str, message: str, column: str | None = None) -> RowError:
        return RowError(reason, f"{self.where(column)}: {message}")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or nothing."""
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.6)
    return f"; did you mean {lower[close[0]]!r}?" if close else ""
