"""The terminal as every verb writes to it."""

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
