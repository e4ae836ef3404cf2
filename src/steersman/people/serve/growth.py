"""How far a request has come, told by the engine's thread to the event loop that sends it on."""

from __future__ import annotations

import asyncio

from steersman.rollout.live import Ticket


class Growth:
    """How many tokens of each of a request's `n` sequences a stream may read, and an event that is set at each step.

    The engine appends a token before it knows whether a stop string is whole with it. So what may be read is told
    between its steps, and of a sequence that has ended no more than before its last step: its text is the sample's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, n: int) -> None:
        self.loop, self.wake = loop, asyncio.Event()
        self.readable = [0] * n
        self.ticket: Ticket | None = None

    def changed(self) -> None:
        """Called by the engine's thread after a step; the first may be over before the request's ticket is known."""
        if self.ticket is not None:
            for j, sequence in enumerate(self.ticket.sequences):
                if j not in self.ticket.samples:
                    self.readable[j] = len(sequence.ids)
        self.loop.call_soon_threadsafe(self.wake.set)
