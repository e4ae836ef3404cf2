"""A prompt made from a row's columns, as `data.prompt_template` and `teacher.prompt` ask for it."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Self

from steersman.data.rows import Row, nearest
from steersman.types import SteersmanError

Piece = tuple[str, str | None, str | None, str | None]
"""Text, and the column, format and conversion behind it; None where no column is."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """Text with columns in braces, such as `{question} ({year:04})`. `key` is the recipe's key that it stands in."""

    key: str
    pieces: list[Piece]

    @classmethod
    def parse(cls, text: str, key: str) -> Self:
        """Raises SteersmanError for a template that no row could fill."""
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise SteersmanError(f"{key}: {error}; write {{{{ and }}}} for plain braces") from error
        for _, column, spec, conversion in pieces:
            if conversion not in (None, "a", "r", "s"):
                raise SteersmanError(
                    f"{key}: {{{column}!{conversion}}} asks for the conversion {conversion!r}, which there is not; "
                    "there are !s, !r and !a"
                )
            if spec and "{" in spec:
                raise SteersmanError(
                    f"{key}: {{{column}:{spec}}} has a column inside a format, which is not read; write the format "
                    f"itself, such as {{{column}:10}}"
                )
        return cls(key, pieces)

    @property
    def columns(self) -> set[str]:
        """The names in braces."""
        return {column for _, column, _, _ in self.pieces if column is not None}

    def fill(self, row: Row) -> str:
        """Raises SteersmanError for braces that hold no column's name, and RowError for a column that the row lacks,
        that is null, or that can not be written so."""
        out = []
        for text, column, spec, conversion in self.pieces:
            out.append(text)
            if column is None:
                continue
            if not column.isidentifier() and column not in row.data:
                raise SteersmanError(f"{self.key}: {{{column}}} is no column name")
            out.append(self._written(row, column, spec or "", conversion))
        return "".join(out)

    def _written(self, row: Row, column: str, spec: str, conversion: str | None) -> str:
        if row.data.get(column) is None:
            reason = "missing value" if column in row.data else "missing field"
            why = "it is null" if column in row.data else f"the row has {', '.join(map(repr, row.data))}"
            hint = "" if column in row.data else nearest(column, row.data)
            raise row.fault(reason, f"{self.key} names {{{column}}}, and {why}{hint}", column)
        got = row.data[column]
        try:
            return format(string.Formatter().convert_field(got, conversion), spec)
        except (TypeError, ValueError) as error:
            raise row.fault(
                "wrong type",
                f"{self.key} writes it with the format {spec!r}, which {type(got).__name__} {str(got)[:40]!r} can "
                f"not have ({error}); write {{{column}}}, or mend the value (CSV files hold text alone)",
                column,
            ) from error
