"""Threads that run episodes' code beside the model, each call with a time limit.

A thread that hangs can't be stopped in Python. It is given up: its call has failed, another thread takes its place,
and if the call ever returns the thread closes what it held and ends. Threads are daemons, so that a hung one holds no
process back.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from steersman.guards.user_code import no_sudden_end
from steersman.types import SteersmanError

_ABANDONED = 512
"""Threads that may hang at once before the run is stopped: each keeps its memory."""


class TooLateError(Exception):
    """A call took longer than the limit that it has here."""


@dataclass(slots=True)
class Job:
    """One call: `key` is whose, `who` names it in messages, `result` or `error` is what came of it.

    `drop` closes what the call held: called by its thread once it has ended, where it was given up before.
    """

    key: int
    call: Callable[[], Any]
    limit: float | None
    who: str
    drop: Callable[[], None]
    started: float | None = None
    result: Any = None
    error: BaseException | None = None
    over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def finish(self, result: Any = None, error: BaseException | None = None) -> bool:
        """Records the outcome; False where there is one already."""
        with self.lock:
            if self.over:
                return False
            self.result, self.error, self.over = result, error, True
            return True


class Workers:
    """Up to `count` threads. `submit` puts a call in line; `take` gives those that are over."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._line: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._over: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._running: dict[int, Job] = {}
        self._lock = threading.Lock()
        self._threads = self._idle = 0
        self._closed = False
        self.abandoned = 0
        self.pending = 0

    def submit(
        self, key: int, call: Callable[[], Any], limit: float | None, who: str, drop: Callable[[], None]
    ) -> None:
        """Puts a call in line; its limit counts from when it starts. `drop`: see `Job`."""
        self.pending += 1
        self._line.put(Job(key, call, limit, who, drop))
        with self._lock:
            if self._idle < self._line.qsize() and self._threads < self.count:
                self._start()

    def take(self, wait: bool) -> list[Job]:
        """The calls that are over; with `wait` at least one of those in line."""
        out: list[Job] = []
        while self.pending and (wait or not self._over.empty() or not out):
            self._give_up()
            try:
                job = self._over.get(timeout=0.02 if wait and not out else 0)
            except queue.Empty:
                if out or not wait:
                    break
                continue
            self.pending -= 1
            out.append(job)
        return out

    def close(self) -> None:
        """Lets idle threads end; calls in line are not begun, and those under way are given up."""
        with self._lock:
            self._closed = True
            for job in self._running.values():
                self._abandon(job)
            for _ in range(self._threads):
                self._line.put(None)

    def _start(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name="episode", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            job = self._line.get()
            with self._lock:
                self._idle -= 1
                if job is None or self._closed:
                    self._threads -= 1
                    return
                job.started = time.monotonic()
                self._running[id(job)] = job
            kept = self._run(job)
            with self._lock:
                self._running.pop(id(job), None)
                if not kept:  # given up long ago; another thread stands in
                    self.abandoned -= 1
                    return

    def _run(self, job: Job) -> bool:
        try:
            with no_sudden_end(job.who):
                result = job.call()
        except BaseException as error:
            kept = job.finish(error=error)
        else:
            kept = job.finish(result)
        if kept:
            self._over.put(job)
        else:
            with suppress(BaseException), no_sudden_end(job.who):
                job.drop()
        return kept

    def _abandon(self, job: Job) -> bool:
        """Gives up a call that runs; False where it has just ended. The lock is held."""
        if not job.finish(error=TooLateError()):
            return False
        self.abandoned += 1
        self._threads -= 1
        return True

    def _give_up(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [
                job for job in self._running.values()
                if job.limit is not None and job.started is not None and now - job.started > job.limit
            ]  # fmt: skip
            for job in late:
                if not self._abandon(job):
                    continue
                self._running.pop(id(job), None)
                self._over.put(job)
                if self._line.qsize():
                    self._start()
            if self.abandoned > _ABANDONED:
                raise SteersmanError(
                    f"environment: {self.abandoned} calls hang beyond their time limit, and each holds a thread; "
                    "mend the tool, or give it a time limit of its own"
                )
