"""On Linux: a child that dies with its parent, and orphans that become our children; nothing on other systems."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

_PARENT_DIED, _ADOPT = 1, 36
"""Numbers of prctl: a signal at the parent's death; orphans among the descendants become children."""


def die_with_parent() -> None:
    """In a child: SIGKILL once its parent has ended."""
    _prctl(_PARENT_DIED, signal.SIGKILL)


def adopt_orphans() -> None:
    """Descendants of this process whose parents end become its children."""
    _prctl(_ADOPT, 1)


def children() -> set[int]:
    """The ids of this process's children, adopted ones too; none where the system does not list them."""
    found: set[int] = set()
    for file in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        with suppress(OSError):
            found |= {int(word) for word in file.read_text().split()}
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
