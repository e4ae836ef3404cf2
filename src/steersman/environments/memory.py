"""How much memory a process and all that it started hold together."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_HELD = (b"Pss:", b"SwapPss:")
"""A page that several processes share counts for each of them in part, so that their sum is what they hold."""


def held_by(process: int) -> int:
    """Bytes that the process and its descendants hold, swapped ones too; of one that has ended, none.

    Reads /proc, which must have `task/*/children` and `smaps_rollup` (Linux 4.14).
    """
    held, waiting, seen = 0, [process], set[int]()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        place = Path(f"/proc/{one}")
        with suppress(OSError):
            held += sum(int(line.split()[1]) for line in _lines(place / "smaps_rollup") if line.startswith(_HELD))
        with suppress(OSError):
            for children in place.glob("task/*/children"):
                with suppress(OSError):
                    waiting += map(int, children.read_bytes().split())
    return held * 1024


def _lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines()
