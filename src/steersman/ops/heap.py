"""What a backward pass has freed, given back to the system while it goes on.

torch asks the C library for each tensor on a CPU, and glibc (up to 2.37 at least) has no use for most of what it gets
back: it aligns a block by asking for more than it hands out, so a freed place is too small for the next tensor of its
size. Activations that a backward pass has freed then stay with the process beside the gradients that it makes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

EVERY = 128 << 20
"""Bytes freed between two times that they are given back; each takes some milliseconds."""
_freed = 0


def freed(size: int) -> None:
    """Tells that about `size` more bytes were freed."""
    global _freed
    _freed += size
    if _freed >= EVERY:
        _freed = 0
        give_back()


def give_back() -> None:
    """Gives the system back what the C library keeps of freed blocks, where it can be asked to."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # another C library than glibc has none
