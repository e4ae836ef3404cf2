"""What signals do in this process stays its own, whatever code that is not ours puts there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

KEPT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""The signals by which a terminal or a scheduler ends a process."""


@contextmanager
def signals_kept() -> Iterator[None]:
    """Whatever the body puts in the place of this process's handlers, they are back after it.

    Torch's launcher puts its own there for good: after a cell of a matrix on ranks Ctrl-C would be an error of
    torch's, and `nohup` in vain. Ray ends a process by SIGTERM with a handler in Python, and with one in C++ that
    Python does not see: a run would end in the middle of a step. Outside the main thread Python sets no handler, and
    this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in KEPT}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # else it was not Python that had set it
                signal.signal(number, handler)
