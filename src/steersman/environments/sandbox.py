"""Python programs of others, run in a process of their own that can reach nothing and take little.

The kernel's namespaces give the program a root of its own, in which only the Python that runs it stands, read-only,
beside an empty working folder in memory; no network; no process but its own; no capability. A filter of system calls
(`filters.py`) keeps it from making namespaces, in which it would have capabilities, and memory that is not counted.
Limits hold its time, memory, processes, files and output. Of memory, each process may map no more than the limit, and
all of them together are looked at every `LOOK` seconds and ended where they hold more; what they take between two
looks is not prevented, and the kernel's killer of processes, should memory run out, is told to begin with them.
Bubblewrap sets the namespaces up where it is installed and works, else `unshare` (`jails.py`). Where the machine
gives no such namespaces, or there is no such filter for it, nothing is run: the sandbox refuses by name.
"""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steersman.environments.filters import SET_UP, seccomp_filter, why_no_filter
from steersman.environments.jails import JAILS, LIMITS, Jail, Limits
from steersman.environments.memory import held_by
from steersman.environments.text import clean_text
from steersman.types import SteersmanError

LOOK = 0.025
"""Seconds between two looks at the memory that a program's processes hold."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: `code` as a shell has it, `output` of both streams, cut, `late` where time was over, and
    `too_large` where its processes held more memory than they may."""

    code: int
    output: str
    late: bool
    too_large: bool = False

    @property
    def good(self) -> bool:
        return self.code == 0 and not self.late and not self.too_large


def run_python(program: str, limits: Limits = LIMITS, *, given: str = "") -> Outcome:
    """Runs a program with the standard library alone; `given` is its standard input.

    Raises SteersmanError where this machine has no sandbox.
    """
    jail, problem = _jail()
    if jail is None:
        raise SteersmanError(f"sandbox: {problem}; programs of others are not run without one")
    return _run(jail, program, limits, given)


def why_not() -> str | None:
    """Why nothing can be sandboxed here; None where it can."""
    return _jail()[1]


@functools.cache
def _jail() -> tuple[Jail | None, str | None]:
    """The first jail that works here, or why none does. A program is run in each to find out."""
    if sys.platform != "linux":
        return None, f"needs Linux's namespaces, which {sys.platform} has not"
    if (problem := why_no_filter()) is not None:
        return None, problem
    why = []
    for jail in JAILS:
        problem = broken(jail)
        if problem is None:
            return jail, None
        why.append(f"{jail.name} {problem}")
    return None, "; ".join(why)


@functools.cache
def broken(jail: Jail) -> str | None:
    """Why a jail does not work here; None where it does."""
    if missing := jail.missing():
        return f"needs {', '.join(missing)}, which are not installed"
    found = _run(jail, _PROBE, Limits(), "")
    if not found.good or not found.output.startswith("42 "):
        return f"does not work here: {found.output[-300:]}"
    if found.output != "42 -1\n":
        return "does not hold here: a program in it can make itself a user namespace"
    if not _run(jail, _LARGE_PROBE, Limits(memory=200), "").too_large:
        return "does not hold here: the memory that its programs hold can not be read from /proc"
    return None


_PROBE = "import ctypes\nprint(6 * 7, ctypes.CDLL(None).unshare(0x10000000))"
_LARGE_PROBE = "import os, time\nos.fork()\nheld = b'a' * (120 << 20)\ntime.sleep(4)"
"""Two processes, each within the limit."""


def run_code(code: str) -> str:
    """Runs a Python program and gives what it prints.

    Args:
        code: the whole program; only the standard library can be imported
    """
    found = run_python(code)
    end = "" if found.code == 0 else f"\n(exit code {found.code})"
    if found.late:
        end = "\n(stopped: out of time)"
    elif found.too_large:
        end = "\n(stopped: it holds too much memory)"
    return (found.output + end).strip() or "(no output)"


def unit_tests(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    tests: Sequence[str | Sequence[str]],
    seconds: float = 5.0,
) -> list[float]:
    """1 where the completion's program, followed by the row's `tests`, runs to its end, else 0.

    Tests are code such as asserts: a text, or a list of texts that run one behind the other. Of a completion with
    fenced code the last fence counts. What program and tests print is thrown away. Leaving early claims nothing:
    behind the tests a word must be said that stands in neither, through a descriptor of its own. Program and tests
    share a process, so one that is written to forge that word can; what it can't do is leave the sandbox.
    Raises SteersmanError for tests that are neither, and where this machine has no sandbox.
    """
    programs = [_tests_of(given) for given in tests]
    return [float(_passes(program_of(c), t, seconds)) for c, t in zip(completions, programs, strict=True)]


def _tests_of(given: Any) -> str:
    """A row's tests as one program."""
    lines = [given] if isinstance(given, str) else given
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
        raise SteersmanError(
            f"unit_tests: the column `tests` holds {clean_text(repr(given), 80)}; give a text or a list of texts"
        )
    return "\n".join(lines)


def program_of(completion: str) -> str:
    """The last fenced block of a text, or all of it where there is none."""
    parts = completion.split("```")
    if len(parts) < 3:
        return completion
    block = parts[-2] if len(parts) % 2 else parts[-1]
    first, newline, rest = block.partition("\n")
    return rest if newline and first.strip() in ("", "python", "py", "python3") else block


def _passes(program: str, tests: str, seconds: float) -> bool:
    word = os.urandom(16).hex()
    runner = (
        "import os, sys\n"
        f"program, tests = {program!r}, {tests!r}\n"
        "space = {'__name__': 'solution'}\n"
        "read, write, line, nowhere = sys.stdin.read, os.write, os.dup(1), os.open(os.devnull, os.O_WRONLY)\n"
        "os.dup2(nowhere, 1)\nos.dup2(nowhere, 2)\n"
        "exec(compile(program, 'solution', 'exec'), space)\n"
        "exec(compile(tests, 'tests', 'exec'), space)\n"
        "write(line, ('\\n' + read()[::-1]).encode())\n"
    )
    found = run_python(runner, Limits(seconds=seconds), given=word)
    return found.good and found.output.endswith("\n" + word[::-1])


def _run(jail: Jail, program: str, limits: Limits, given: str) -> Outcome:
    binary: str = sys._base_executable  # type: ignore[attr-defined]
    python = [str(Path(binary).resolve()), "-I", "-S", "-B", "-c", _BOOT, seccomp_filter().hex()]
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        process = subprocess.Popen(
            jail.command(root, limits, python), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"},
        )  # fmt: skip
        try:
            return _watched(process, program, limits, given)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()


_BOOT = (
    "import sys\n"
    f"{SET_UP}"
    "with open('/proc/self/oom_score_adj', 'w') as file:\n    file.write('1000')\n"
    "size = int(sys.stdin.buffer.readline())\ntext = sys.stdin.buffer.read(size).decode()\n"
    "exec(compile(text, 'program', 'exec'), {'__name__': '__main__'})"
)


def _watched(process: subprocess.Popen[bytes], program: str, limits: Limits, given: str) -> Outcome:
    """Feeds the program, reads what it says up to the limit, and gives it up when its time is over or it holds too
    much memory."""
    assert process.stdin is not None
    assert process.stdout is not None
    text = program.encode("utf-8", "replace")
    to_write = memoryview(str(len(text)).encode() + b"\n" + text + given.encode("utf-8", "replace"))
    os.set_blocking(process.stdin.fileno(), False)
    deadline, said, late = time.monotonic() + limits.seconds, bytearray(), False
    watch = _MemoryWatch(process.pid, limits.memory << 20)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        reading = True
        while reading:
            left = deadline - time.monotonic()
            if left <= 0 or len(said) > 4 * limits.output or watch.too_large():
                late = left <= 0
                break
            for key, _ in selector.select(min(left, LOOK)):
                if key.fileobj is process.stdout:
                    piece = os.read(process.stdout.fileno(), 65_536)
                    said += piece
                    reading = bool(piece)
                    continue
                try:
                    to_write = to_write[os.write(process.stdin.fileno(), to_write) :]
                except BrokenPipeError:
                    to_write = to_write[:0]
                if not to_write:
                    selector.unregister(process.stdin)
                    process.stdin.close()
    flooded = len(said) > 4 * limits.output
    code, deadline = -9, max(deadline, time.monotonic() + 0.1)
    while not late and not flooded and not watch.too_large():
        try:
            code = process.wait(LOOK)
            break
        except subprocess.TimeoutExpired:
            late = time.monotonic() >= deadline
    text_said = clean_text(said.decode("utf-8", "replace"), limits.output)
    return Outcome(code, text_said, late, watch.found)


class _MemoryWatch:
    """Looks every `LOOK` seconds at the memory that a process and its descendants hold; `found` once it was more than
    `most` bytes."""

    def __init__(self, process: int, most: int) -> None:
        self.process, self.most, self.found, self._next = process, most, False, 0.0

    def too_large(self) -> bool:
        if not self.found and time.monotonic() >= self._next:
            self.found = held_by(self.process) > self.most
            self._next = time.monotonic() + LOOK
        return self.found
