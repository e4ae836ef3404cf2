"""math-verify in a process of its own, so that no answer can take more time or memory than it is given.

Run as a program this file is that process: a line of JSON `{"number", "given", "wanted"}` in, a line
`{"number", "has_answer", "equal"}` with the question's number out. It imports nothing of this package, so that it
starts fast.
"""

from __future__ import annotations

import atexit
import json
import os
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
    """Asks the process, started at the first question and killed where one takes too long or is interrupted.

    A fork of this process starts one of its own.
    """

    def __init__(self, limit: float = LIMIT) -> None:
        self.limit, self._asked = limit, 0
        self._forked()
        os.register_at_fork(after_in_child=self._forked)
        atexit.register(self.close)

    def ask(self, given: str, wanted: str) -> Verdict | None:
        """The verdict; None where it took too long or the process died of the question.

        Whatever is raised while it waits, Ctrl-C as well, ends the process: what that still owes answers no later
        question.
        """
        with self._lock:
            try:
                verdict = self._reply(self._process or self._start(), given, wanted)
            except BaseException:
                self._end()
                raise
            if verdict is None:
                self._end()
            return verdict

    def close(self) -> None:
        """Ends the process; the next question starts another one."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        if _line(self._process, time.monotonic() + START_LIMIT) is None:
            raise OSError(f"the process of math-verify did not start within {START_LIMIT:g} seconds")
        return self._process

    def _reply(self, process: subprocess.Popen[bytes], given: str, wanted: str) -> Verdict | None:
        """The reply with the question's number; those to earlier questions are passed over."""
        assert process.stdin is not None
        self._asked += 1
        asked = {"number": self._asked, "given": given, "wanted": wanted}
        try:
            process.stdin.write(json.dumps(asked).encode() + b"\n")
        except OSError:
            return None
        until = time.monotonic() + self.limit
        while (lines := _line(process, until)) is not None:
            told = json.loads(lines.splitlines()[-1])
            if told["number"] == self._asked:
                return Verdict(told["has_answer"], told["equal"])
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
        asked = json.loads(line)
        try:
            found, equal = judged(asked["given"], asked["wanted"])
        except (Exception, RecursionError):
            found, equal = False, False
        print(json.dumps({"number": asked["number"], "has_answer": found, "equal": equal}), flush=True)


if __name__ == "__main__":
    _serve()
