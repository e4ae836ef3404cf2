"""Signals that end a run at the end of its step."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

from steersman.distributed.ranks import ranks
from steersman.guards.user_code import CtrlCError


class StopRequest:
    """While open, the first SIGTERM, SIGHUP or Ctrl-C only sets `signal_name`: the loop ends its step and saves.

    A second Ctrl-C raises KeyboardInterrupt at once. A process that was started to ignore SIGHUP (`nohup`) goes on
    ignoring it. Outside the main thread Python takes no signals, and this does nothing.

    A run may be a stage of a larger one, which has a request of its own: what came while the stage's was open is the
    larger one's too once the stage ends, even where the stage had taken its last step already.
    """

    _around: StopRequest | None = None
    """The innermost one that is open."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[int, Any] = {}
        self._outer: StopRequest | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        try:
            ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            for number in (signal.SIGTERM, signal.SIGINT, *(() if ignored else (signal.SIGHUP,))):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:
            self._before = {}
            return self
        self._outer, StopRequest._around = StopRequest._around, self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if StopRequest._around is not self:
            return
        StopRequest._around = self._outer
        if self._outer is not None:
            self._outer.signal_name = self._outer.signal_name or self.signal_name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise CtrlCError
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            # The print machinery may be in the middle of a line; a bare write is safe in a handler.
            text = f"\n{self.signal_name}: finishing this step and saving; Ctrl-C (again) aborts at once\n"
            if ranks().main:
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
