"""Around code of the user's: what it does to the process is undone, or named where it can't be."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from steersman.guards.handlers import signals_kept
from steersman.guards.timers import signal_after
from steersman.types import SteersmanError


class _ExitAskedError(BaseException):
    """`os._exit` was called; no `except Exception` of the user's may swallow it."""


class _TooLateError(BaseException):
    """The time is over; no `except Exception` of the user's may swallow it."""


class CtrlCError(KeyboardInterrupt):
    """Ctrl-C, as the project raises it from its handlers of SIGINT; a plain KeyboardInterrupt may be the user's."""


leave_now = os._exit
"""Ends the process at once, whatever stands in the place of `os._exit`: for the project's own use."""


@contextmanager
def user_code(who: str, limit: float | None = None) -> Iterator[None]:
    """Runs a block that calls code of the user's, named `who` in messages.

    An exit that it asks for, by `sys.exit` or `os._exit`, is a SteersmanError, so that a run never ends without a
    word and as if it had been done; so is a KeyboardInterrupt of its own, which is told from Ctrl-C where a handler
    of this project stands, and a block that takes longer than `limit` seconds. Standard output and error that it
    closes or points elsewhere are put back, and so is what `settings_kept` names. Other exceptions pass.

    The limit holds in the main thread, in Python code and in a search of `re`, not inside one call of another
    compiled library. For a block in another thread see `no_sudden_end`.
    """
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with streams_kept(), settings_kept():
        try:
            with no_sudden_end(who), time_limit(who, limit):
                yield
        except SystemExit as error:
            raise _left(who, f"sys.exit({'' if error.code is None else error.code})") from error
        except GeneratorExit as error:
            raise _left(who, "GeneratorExit") from error
        except CtrlCError:
            raise
        except KeyboardInterrupt as error:
            if default:
                raise
            raise _left(who, "KeyboardInterrupt") from error


@contextmanager
def no_sudden_end(who: str) -> Iterator[None]:
    """Runs a block, in any thread, in which `os._exit` is a SteersmanError that names `who`.

    `os._exit` is replaced while any such block runs, for all threads of this process alone (a child that it forks
    leaves as ever).
    """
    _replacement.begin()
    try:
        yield
    except _ExitAskedError as error:
        raise _left(who, str(error)) from error
    finally:
        _replacement.end()


class _Replacement:
    """Stands in the place of `os._exit` from the first block that begins to the last one that ends."""

    def __init__(self) -> None:
        self.lock, self.blocks, self.process = threading.Lock(), 0, os.getpid()

    def begin(self) -> None:
        with self.lock:
            self.blocks, self.process, os._exit = self.blocks + 1, os.getpid(), self

    def end(self) -> None:
        with self.lock:
            self.blocks -= 1
            if not self.blocks:
                os._exit = leave_now

    def __call__(self, status: int) -> NoReturn:
        if os.getpid() != self.process:
            leave_now(status)
        raise _ExitAskedError(f"os._exit({status})")


_replacement = _Replacement()


def _left(who: str, how: str) -> SteersmanError:
    return SteersmanError(
        f"{who}: it asked the process to end, by {how}; a run ends when it is done, so raise an error with a reason"
    )


@contextmanager
def time_limit(who: str, limit: float | None) -> Iterator[None]:
    """Ends a block that takes longer than `limit` seconds, with a SteersmanError that names `who`; where the block
    swallows that, it is ended again every second. Holds in the main thread, where `user_code` says.

    The process's only alarm is left to the code in the block, which may use it.
    """
    if limit is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    over = threading.Event()

    def late(number: int, frame: FrameType | None) -> None:
        if not over.is_set():
            raise _TooLateError

    before = signal.signal(signal.SIGUSR2, late)
    try:
        with signal_after(limit, signal.SIGUSR2):
            try:
                yield
            finally:
                over.set()
    except _TooLateError as error:
        raise SteersmanError(f"{who}: it took longer than its limit of {limit:g} seconds") from error
    finally:
        signal.signal(signal.SIGUSR2, before or signal.SIG_DFL)


@contextmanager
def settings_kept() -> Iterator[None]:
    """Puts back what belongs to the process and not to the block: the working folder, torch's gradient mode, default
    type and number of threads, and what the signals that end a process do."""
    import torch

    folder, gradients = _working_folder(), torch.is_grad_enabled()
    kind, threads = torch.get_default_dtype(), torch.get_num_threads()
    try:
        with signals_kept():
            yield
    finally:
        if folder is not None and _working_folder() != folder:
            os.chdir(folder)
        if torch.is_grad_enabled() != gradients:
            torch.set_grad_enabled(gradients)
        if torch.get_default_dtype() != kind:
            torch.set_default_dtype(kind)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _working_folder() -> str | None:
    """None where it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


@contextmanager
def streams_kept() -> Iterator[None]:
    """Puts back standard output and error, the descriptors and Python's files, where the block took them away."""
    files: dict[str, Any] = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    kept = {number: os.dup(number) for number in (1, 2) if _identity(number) is not None}
    try:
        yield
    finally:
        for number, copy in kept.items():
            if _identity(number) != _identity(copy):
                os.dup2(copy, number)
            os.close(copy)
        for number, (name, file) in enumerate(files.items(), 1):
            closed = file is not None and file.closed
            again = open(number, "w", encoding="utf-8", errors="replace", closefd=False) if closed else file  # noqa: SIM115
            setattr(sys, name, again)


def _identity(number: int) -> tuple[int, int] | None:
    """Which file a descriptor is open on; None where it is closed."""
    try:
        stat = os.fstat(number)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
