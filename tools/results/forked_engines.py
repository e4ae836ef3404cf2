"""Engine processes forked from one that has imported everything, so that starting one costs no seconds of imports.

Only how they come to be is another: the keeper runs its own code on the same pipes, and the engine is the keeper's
child in a session of its own, with the same log, arguments and signal at its parent's death.
"""

from __future__ import annotations

import array
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from steersman.rollout.remote import keeper, launch, serve

ENGINE = "steersman-serve"
"""What /proc/PID/comm of a forked engine says."""
SET_NAME = 15
"""Number of Linux's prctl for it."""


class Forked:
    """A child of this process, with what of `subprocess.Popen` a keeper asks for."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            there, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if there else None
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def child(work: Callable[[], Any]) -> int:
    """Forks a process that does the work and ends; gives its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = work()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def engine(command: Sequence[str], *, stdout: Any, preexec_fn: Callable[[], Any], **_: Any) -> Forked:
    """In a keeper, in the place of `subprocess.Popen`."""

    def work() -> None:
        os.setsid()
        preexec_fn()
        keeper.ctypes.CDLL(None).prctl(SET_NAME, ENGINE.encode(), 0, 0, 0)
        pipes(os.open(os.devnull, os.O_RDONLY), os.dup(stdout.fileno()))
        os.dup2(1, 2)
        sys.argv = list(command[command.index("-m") + 1 :])
        serve.main()

    return Forked(child(work))


def pipes(reads: int, writes: int) -> None:
    """Makes them standard input and output."""
    for number, fd in enumerate((reads, writes)):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout = os.fdopen(0, "r", closefd=False), os.fdopen(1, "w", closefd=False)


class Nursery:
    """A process that forks a keeper whenever a learner asks; made before the learners are, which inherit it."""

    def __init__(self) -> None:
        self.asks, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.pid = child(lambda: self._serve(answers))
        answers.close()

    def _serve(self, asked: socket.socket) -> None:
        self.asks.close()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so the kernel takes leave of keepers
        while True:
            data, fds, _, _ = socket.recv_fds(asked, 1 << 17, 2)
            words, environment = pickle.loads(data)

            def keep(fds: Any = fds, words: Any = words, environment: Any = environment) -> int:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                asked.close()
                pipes(*fds)
                os.environ.clear()
                os.environ.update(environment)
                keeper.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": engine})  # type: ignore[assignment]
                return keeper.main(words)

            child(keep)
            for fd in fds:
                os.close(fd)

    def start(self, words: Sequence[str], *, env: Mapping[str, str], **_: Any) -> Any:
        """In a learner, in the place of `subprocess.Popen`: a keeper by its command line, with both pipes."""
        reads, stdin = os.pipe()
        stdout, writes = os.pipe()
        told = pickle.dumps((list(words[words.index(str(launch.KEEPER)) + 1 :]), dict(env)))
        self.asks.sendmsg([told], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reads, writes]))])
        os.close(reads)
        os.close(writes)
        return Keeper(stdin, stdout)

    def adopt(self) -> None:
        """From now on this process, a learner, has its engines forked here."""
        launch.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": self.start})  # type: ignore[assignment]


class Keeper:
    """A keeper at the other end of two pipes, with what of `subprocess.Popen` `ServerProcess` asks for."""

    def __init__(self, stdin: int, stdout: int) -> None:
        self.stdin, self.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")

    def communicate(self, word: bytes) -> None:
        """Says the word, and waits until the keeper has ended."""
        try:
            with self.stdin:
                self.stdin.write(word)
        finally:
            with self.stdout:
                self.stdout.read()


def engines() -> list[int]:
    """The forked engines that run."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                name = (path / "comm").read_text().strip()
            except OSError:
                continue
            if name == ENGINE:
                found.append(int(path.name))
    return found
