"""Lines about long stretches without a step: looks at held-out data, and passes over all data before training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
EVERY = 5.0
"""Seconds between two lines; what takes less is not worth one."""


class ProgressLine:
    """Tells (prints) how far a stretch of work is and how long it will still take, every `EVERY` seconds."""

    def __init__(self, what: str, tell: Callable[[str], object] | None = None) -> None:
        self.what, self.tell = what, tell or _print
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int, _tokens: int = 0) -> None:
        """`done` of `total` parts of like size are over; also what the sampler calls."""
        now = time.monotonic()
        if 0 < done < total and now - self.last >= EVERY:
            self.last = now
            left = (now - self.start) / done * (total - done)
            self.tell(f"{self.what}: {done} of {total}, about {left:.0f} s left")


def _print(line: str) -> None:
    print(line, flush=True)


def with_progress(parts: Sequence[T], what: str) -> Iterator[T]:
    """The parts one by one, with a `ProgressLine` over them."""
    stretch = ProgressLine(what)
    for i, part in enumerate(parts):
        yield part
        stretch(i + 1, len(parts))
