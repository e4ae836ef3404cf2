"""How a service ends: not before what it has open is closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from steersman.guards.handlers import signals_kept
from steersman.guards.user_code import CtrlCError


@contextmanager
def closed_before_end() -> Iterator[None]:
    """In the body SIGTERM and SIGHUP are what Ctrl-C is, an exception, so that its `finally` is run.

    Else they end the process where it stands; uvicorn, too, which takes SIGTERM while it serves, raises it again when
    it has ended. A process that was started to ignore SIGHUP (`nohup`) goes on ignoring it. Outside the main thread
    Python takes no signals, and this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with signals_kept():
        signal.signal(signal.SIGTERM, _end)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        yield


def _end(*_: object) -> NoReturn:
    raise CtrlCError
