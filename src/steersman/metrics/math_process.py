"""math-verify in a process of its own, so that no answer can take more time or memory than it is given.

Run as a program this file is that process: a line of JSON `{"given", "wanted"}` in, `{"has_answer", "equal"}` out. It
imports nothing of this package, so that it starts fast.
"""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

LIMIT = 5.0
"""Seconds that one answer may take."""
START_LIMIT = 120.0
"""Seconds that the process may take to start, on a machine that is busy."""
MEMORY = 4 << 30
"""Address space of the process, in bytes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`has_answer`: the given text holds an answer; `equal`: it is the wanted one."""

    has_answer: bool
    equal: bool


class MathProcess:
    """Asks the process, started at the first question and killed where one takes too long."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.limit, self._lock = limit, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def ask(self, given: str, wanted: str) -> Verdict | None:
        """The verdict; None where it took too long or the process died of the question."""
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"given": given, "wanted": wanted}).encode() + b"\n")
                process.stdin.flush()
            except OSError:
                line = None
            else:
                line = _line(process, self.limit)
            if line is None:
                self._end()
                return None
            return Verdict(**json.loads(line))

    def close(self) -> None:
        """Ends the process; the next question starts another one."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        if _line(self._process, START_LIMIT) is None:
            self._end()
            raise OSError(f"the process of math-verify did not start within {START_LIMIT:g} seconds")
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _line(process: subprocess.Popen[bytes], limit: float) -> bytes | None:
    """The next line that the process says; None where it ends or says none within `limit` seconds."""
    assert process.stdout is not None
    raw, until = b"", time.monotonic() + limit
    while not raw.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        more = process.stdout.read(65536) if ready else b""
        if not more:
            return None
        raw += more
    return raw


def _serve() -> None:
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is the end of this one
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import parse, verify

    def judged(given: str, wanted: str) -> tuple[bool, bool]:
        found = parse(given, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        if not found:
            return False, False
        expected = parse(f"${wanted}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        return True, bool(expected) and verify(expected, found, timeout_seconds=None)

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            found, equal = judged(**json.loads(line))
        except (Exception, RecursionError):
            found, equal = False, False
        print(json.dumps({"has_answer": found, "equal": equal}), flush=True)


if __name__ == "__main__":
    _serve()
