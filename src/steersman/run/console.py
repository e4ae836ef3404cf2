"""The terminal as every verb writes to it, and how long things took."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def new_console(**how: Any) -> Console:
    """Standard output, on which every text stands as it is; `how` are further settings of rich's console.

    Nothing in a text is read as markup (`[red]`) or as an emoji's name (`:key:`), and no number gets a colour. What
    is to be coloured has a `style`, or is a rich `Text`. Text of models or data is printed with `soft_wrap`, so that
    lines break where it has a line break alone. Control characters are for `guards.terminal.printable`.
    """
    return Console(markup=False, emoji=False, highlight=False, **how)


def duration_text(seconds: float) -> str:
    """A finite time as "2 h 05 min", "3 min 07 s" or "12 s"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"
