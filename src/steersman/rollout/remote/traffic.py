"""How calls meet new weights, and how prompts are shared out among servers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Traffic:
    """A readers-writer lock that prefers the writer: calls that sample are readers, an update of weights writes."""

    def __init__(self) -> None:
        self._changed, self._count, self._barred = threading.Condition(), 0, False

    @contextmanager
    def under_way(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._barred)
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    @contextmanager
    def paused(self, cut: Callable[[], None] | None) -> Iterator[None]:
        """While open nothing is under way. What was is waited for, or `cut`, again and again until it is out: a
        request may reach the server after the first cut."""
        with self._changed:
            self._changed.wait_for(lambda: not self._barred)
            self._barred = True
        try:
            while cut is not None and self._count:
                cut()
                with self._changed:
                    self._changed.wait_for(lambda: not self._count, timeout=0.1)
            with self._changed:
                self._changed.wait_for(lambda: not self._count)
            yield
        finally:
            with self._changed:
                self._barred = False
                self._changed.notify_all()


def share_out(groups: Sequence[T], owners: Sequence[int], servers: int) -> list[list[T]]:
    """The groups in as many contiguous shares as there are servers. `owners` has the prompt's number of each: what
    has one prompt stays together, so that a server counts its occurrences as one engine would."""
    out: list[list[T]] = [[] for _ in range(servers)]
    home: dict[int, int] = {}
    for place, (group, owner) in enumerate(zip(groups, owners, strict=True)):
        out[home.setdefault(owner, place * servers // len(groups))].append(group)
    return out
