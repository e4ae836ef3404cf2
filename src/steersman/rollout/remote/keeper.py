"""Runs a command and ends it with all that it started, when told so or when whoever asked for it is gone.

    python keeper.py LOG [FOLDER ...] -- COMMAND ...

Standard input is the line to the one who asked: when it closes, for whatever reason (SIGKILL too), every process
that came of the command is asked to end by SIGTERM, and killed if it has not after `GRACE` seconds. Shared memory
that they left is removed, and so are the FOLDERs, unless the last word over the line was KEEP. A keeper that is
killed itself takes the command along. It needs the standard library only; without /proc (not Linux) it knows only
the command's process group, and removes no shared memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

KEEP = b"keep"
GRACE = 15.0
"""Seconds from SIGTERM to SIGKILL."""
LOOK = 1.0
"""Seconds between looks at which shared memory is in use."""
SHARED = Path("/dev/shm")
PARENT_DIED, ADOPT = 1, 36
"""Numbers of Linux's prctl: a signal at the parent's death; orphans among the descendants become children."""


def main(words: list[str]) -> int:
    split = words.index("--")
    log, folders, command = words[0], words[1:split], words[split + 1 :]
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is the learner's, which ends its step first
    _prctl(ADOPT, 1)
    there = _shared()
    with open(log, "ab") as out:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: _prctl(PARENT_DIED, signal.SIGTERM),
        )  # fmt: skip
    print(child.pid, flush=True)
    used: set[Path] = set()
    while child.poll() is None and not select.select([sys.stdin], [], [], LOOK)[0]:
        used |= _mapped(_descendants()) - there
        _reap(child.pid)
    used |= _mapped(_descendants()) - there
    _end(child)  # what it started may outlive it
    _remove(used)
    last = sys.stdin.buffer.read()
    for folder in folders if last != KEEP else ():
        shutil.rmtree(folder, ignore_errors=True)
    return child.returncode


def _end(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM to all that came of the command, SIGKILL to what is there `GRACE` seconds later."""
    _signal(child.pid, signal.SIGTERM)
    until = time.monotonic() + GRACE
    while _left(child):
        if time.monotonic() > until:
            _signal(child.pid, signal.SIGKILL)
        time.sleep(0.02)
    child.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
    for pid in _descendants():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _left(child: subprocess.Popen[bytes]) -> bool:
    """Whether anything that came of the command runs still."""
    ended = child.poll() is not None
    _reap(child.pid)
    if not ended or _descendants():
        return True
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, 0)
        return not Path("/proc/self").exists()  # elsewhere the group is all that is known
    return False


def _reap(child: int) -> None:
    """Takes leave of adopted processes that have ended; the child's own end is `Popen.poll`'s to notice."""
    for pid in _children(os.getpid()):
        if pid != child:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _descendants() -> list[int]:
    found, new = [], _children(os.getpid())
    while new:
        found += new
        new = [pid for parent in new for pid in _children(parent)]
    return found


def _children(pid: int) -> list[int]:
    """Children of all threads of a process; none where there is no /proc."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in file.read_text().split()]
    return found


def _shared() -> set[Path]:
    """The files of shared memory, folders left out."""
    with contextlib.suppress(OSError):
        return {path for path in SHARED.iterdir() if not path.is_dir()}
    return set()


def _mapped(pids: Iterable[int]) -> set[Path]:
    """The files of shared memory that these processes have in their memory."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
            found |= {Path(line[line.index("/") :].rstrip("\n")) for line in lines if f" {SHARED}/" in line}
    return found & _shared()


def _remove(files: set[Path]) -> None:
    """Removes those that no process of this machine has in its memory."""
    if not files:
        return
    others = _mapped(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    for path in files - others:
        path.unlink(missing_ok=True)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
