"""What code of the user's raised: said with the line of the user's own file, and kept whole in a file of the run."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from steersman.guards.user_code import user_code
from steersman.types import SteersmanError

_OURS = Path(__file__).resolve().parents[1]
_LIBRARIES = tuple({Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")})


MOST = 50
"""Tracebacks that one process adds to a file."""


class Tracebacks:
    """A file of whole tracebacks, one of each kind of error at each line. `write` replaces the file's text."""

    def __init__(self, file: Path, write: Callable[[Path, str], None]) -> None:
        self.file, self.write = file, write
        self.seen: set[tuple[str, ...]] = set()

    def add(self, who: str, error: BaseException) -> bool:
        """Keeps the traceback of an error that came up in `who`; whether one of its kind is there."""
        what = (type(error).__name__, place_of(error), *getattr(error, "__notes__", ()))
        if what in self.seen or len(self.seen) >= MOST:
            return what in self.seen
        before = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        self.write(self.file, f"{before}{who}\n{''.join(traceback.format_exception(error))}\n")
        self.seen.add(what)
        return True


kept: list[Tracebacks] = []
"""The files of the run folders that this process holds, newest last."""


def place_of(error: BaseException) -> str:
    """Where an error came up, as " (my_rewards.py, line 12)": the last line in a file of the user's own, else the
    last line of all. "" where the error says it itself, or came from nowhere."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:
        return ""
    frame = next((f for f in reversed(frames) if _is_users(f.filename)), frames[-1])
    return f" ({_shown(frame.filename)}, line {frame.lineno})"


def keep_traceback(who: str, error: BaseException) -> str:
    """Keeps the whole traceback in the run folder, and says where: "; the whole traceback is in FILE". "" where no
    run folder is held or its disk takes nothing more."""
    with suppress(SteersmanError, OSError):
        if kept and kept[-1].add(who, error):
            return f"; the whole traceback is in {kept[-1].file}"
    return ""


@contextmanager
def user_errors(who: str, about: str = "", limit: float | None = None) -> Iterator[None]:
    """`user_code`, in which what the block raises becomes a SteersmanError: `who` raised what, and where.

    `about` says what the code was given. SteersmanError passes, and so does the error of a device without memory.
    """
    import torch

    named = f"{who} ({about})" if about else who
    try:
        with user_code(named, limit):
            yield
    except (SteersmanError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}{place_of(error)}"
        more = f" ({about})" if about else ""
        raise SteersmanError(f"{who}: it raised {said}{more}{keep_traceback(named, error)}") from error


def _is_users(filename: str) -> bool:
    """Whether a file is neither ours, nor the standard library's, nor an installed package's."""
    if filename.startswith("<"):
        return False
    path = Path(filename).resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not any(path.is_relative_to(root) for root in (_OURS, *_LIBRARIES))


def _shown(filename: str) -> str:
    """A file's path, from the current folder where it lies in it."""
    path = Path(filename)
    with suppress(ValueError, OSError):
        return str(path.resolve().relative_to(Path.cwd()))
    return filename
