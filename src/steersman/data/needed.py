"""Rows that have what rewards and metrics need of every row; the others are bad rows, found before anything is
sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from steersman.data.examples import Example
from steersman.data.load import LoadedExamples
from steersman.data.rows import BadRows, Row
from steersman.types import Needs, SteersmanError

E = TypeVar("E", bound=Example)


def whole_rows(rows: Sequence[Row], needs: Needs, bad: BadRows) -> list[int]:
    """The places of the rows that have a value in every column that is needed.

    Raises SteersmanError for a column that no row has, as `bad` says for a row without a value, and where no row is
    left.
    """
    if not rows:
        return []
    needed = needs([row.data for row in rows])
    places = []
    for place, row in enumerate(rows):
        faults = ((need, need.wrong(row.data.get(need.column))) for need in needed)
        fault = next(((need, wrong) for need, wrong in faults if wrong), None)
        if fault is None:
            places.append(place)
        else:
            need, wrong = fault
            bad.add(row.fault("missing field", f"{need.who} needs it of every row, and here {wrong}", need.column))
    if not places:
        first = next(iter(bad.first.values()))
        raise SteersmanError(f"no row is left that has what is needed of it; for example {first}")
    return places


def with_needed(found: Sequence[E], needs: Needs, bad: BadRows) -> list[E]:
    """The examples whose rows have what is needed. Raises SteersmanError as `whole_rows` does."""
    return [found[place] for place in whole_rows([e.row for e in found], needs, bad)]


def loaded_with_needed(loaded: LoadedExamples[E], needs: Needs) -> LoadedExamples[E]:
    """What was loaded, without the rows that lack what is needed; they are counted beside the others left out.
    Raises SteersmanError as `whole_rows` does."""
    bad = loaded.left_out
    return replace(
        loaded, train=with_needed(loaded.train, needs, bad), held_out=with_needed(loaded.held_out, needs, bad)
    )
