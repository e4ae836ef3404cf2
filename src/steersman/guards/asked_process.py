"""A program that answers questions in a process of its own, so that none can take more time than it is given."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

START_LIMIT = 120.0
"""Seconds that a process may take to start, on a machine that is busy."""


class AskedProcess:
    """Asks a Python program, which is started at the first question and killed where one takes longer than `limit`
    seconds or is interrupted; the next question starts it again.

    `file` is run as a program. It writes one line when it is ready, then reads a line of JSON for each question and
    writes one: an object with the question's "number" and whatever it found.

    A fork of this process starts one of its own.
    """

    def __init__(self, file: str, limit: float) -> None:
        self.file, self.limit, self._asked = file, limit, 0
        self._forked()
        os.register_at_fork(after_in_child=self._forked)
        atexit.register(self.close)

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; None where it took too long or the process died of the question.

        Whatever is raised while it waits, Ctrl-C as well, ends the process: what that still owes answers no later
        question. Raises OSError where the process does not start.
        """
        with self._lock:
            try:
                found = self._answer(self._process or self._start(), question)
            except BaseException:
                self._end()
                raise
            if found is None:
                self._end()
            return found

    def close(self) -> None:
        """Ends the process; the next question starts another one."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", self.file]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        if _line(self._process, time.monotonic() + START_LIMIT) is None:
            raise OSError(f"the process of {self.file} did not start within {START_LIMIT:g} seconds")
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], question: dict[str, Any]) -> dict[str, Any] | None:
        """The answer with the question's number; those to earlier questions are passed over."""
        assert process.stdin is not None
        self._asked += 1
        left = memoryview(json.dumps(question | {"number": self._asked}).encode() + b"\n")
        with suppress(OSError):
            while left:
                left = left[process.stdin.write(left) or 0 :]
        if left:
            return None
        until = time.monotonic() + self.limit
        while (lines := _line(process, until)) is not None:
            told = json.loads(lines.splitlines()[-1])
            if told["number"] == self._asked:
                return told
        return None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _forked(self) -> None:
        """Leaves the process, and a lock that a thread may hold, to the parent."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None


def _line(process: subprocess.Popen[bytes], until: float) -> bytes | None:
    """The lines that the process says next; None where it ends, or says none before `until` (monotonic seconds)."""
    assert process.stdout is not None
    raw = b""
    while not raw.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        more = process.stdout.read(65536) if ready else b""
        if not more:
            return None
        raw += more
    return raw
