"""Text that others wrote, on its way to a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import traceback
from types import TracebackType

# C0 but tab and line feed, DEL, C1, the marks that turn the direction of writing, line and paragraph separators,
# and halves of surrogate pairs, which no terminal's encoding takes.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with every character that a terminal would obey written out, ESC as `\x1b`.

    What a model or a data file says can then neither move the cursor, nor colour, nor turn round, what stands
    around it. Line ends and tabs stay; CR LF is a line end.
    """
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def encodes(text: str) -> bool:
    """Whether standard output's encoding has every character of the text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_out_unencodable() -> None:
    r"""From now on standard output writes what its encoding lacks as `\xe9`, as standard error does, in the place of
    an error; where another way of handling it is asked for already, that stays."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def forget_output() -> None:
    """Sends standard output to nowhere: whoever read it has gone, and what is still to be written would be an error
    when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """A line on standard error, `printable`: what any text that was not written here goes through."""
    print(printable(text), file=sys.stderr, flush=True)


def say_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In the place of `sys.excepthook`: the traceback, `printable`, because errors quote what they failed on."""
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))
