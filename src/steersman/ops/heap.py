"""What a backward pass has freed, given back to the system while it goes on.

torch asks the C library for each tensor on a CPU, and glibc (up to 2.37 at least) has no use for most of what it gets
back: it aligns a block by asking for more than it hands out, so a freed place is too small for the next tensor of its
size. Activations that a backward pass has freed then stay with the process beside the gradients that it makes.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

RELEASE_BYTES = 128 << 20
"""Bytes freed from which they are given back; each time takes some milliseconds."""
_freed = 0
_needed = 0


def freed(size: int, *, growing: bool = True) -> None:
    """Tells that about `size` more bytes were freed, and whether what comes next takes more than it frees.

    A backward pass takes less, so what it has freed is given back only once the process holds more than it was seen
    to need, which is the most that it still held when all was given back: to give memory back and ask for it again
    takes a twentieth of an update.
    """
    global _freed, _needed
    _freed += size
    if _freed >= RELEASE_BYTES and (growing or resident() > _needed):
        _freed = 0
        give_back()
        _needed = max(_needed, resident())


def resident() -> int:
    """Bytes that the process has in memory now, on Linux; elsewhere the most that it had."""
    if sys.platform == "linux":
        with suppress(OSError):
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
