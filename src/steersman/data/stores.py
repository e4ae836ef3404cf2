"""Rows that come out of a store of judgements, by the scheme of its address.

The store is a room above this one, so it is named here and loaded when a path asks for it; what it has to offer is
`RowStore`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from steersman.data.rows import Row

if TYPE_CHECKING:
    from steersman.data.config import CountingConfig
    from steersman.data.shapes import Kind

READERS = {
    "sqlite": "steersman.people.store.reading:StoredRows",
    "postgresql": "steersman.people.store.reading:StoredRows",
}
"""Scheme -> "module:class" of a `RowStore`, made of the address."""


class RowStore(Protocol):
    """A store that has rows for more than one kind of examples."""

    def kinds(self, config: CountingConfig) -> list[Kind]:
        """The kinds that it has judgements for, the one with the most first."""
        ...

    def rows(self, want: Kind, config: CountingConfig) -> Iterator[Row]:
        """Rows in a shape that gives examples of this kind."""
        ...


def is_store(path: str) -> bool:
    """Whether a data path is the address of a store."""
    return path.partition("://")[0] in READERS and "://" in path


def open_rows(path: str) -> RowStore:
    """The store behind an address. Raises SteersmanError where it can not be opened."""
    module, _, name = READERS[path.partition("://")[0]].partition(":")
    return getattr(importlib.import_module(module), name)(path)
