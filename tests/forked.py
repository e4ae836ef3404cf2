"""Python in processes of its own that need not import everything first: a server that has done so forks them.

A cold `python -m steersman` spends 4 to 5 s of CPU on imports, more than what most tests start it for.
multiprocessing's fork server is a fresh process too, started once by every process of pytest. What such a process
starts with this Python itself (ranks, engines) is forked from it too, where a test asks for that.
"""

from __future__ import annotations

import atexit
import functools
import gc
import inspect
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PRELOADED = [
    "steersman.cli", "steersman.verbs.sft", "steersman.verbs.preference", "steersman.verbs.reward_model",
    "steersman.verbs.rl", "steersman.flywheel.online_dpo", "steersman.distill.run", "steersman.distributed.launch",
    "steersman.rollout.remote", "transformers.models.llama.modeling_llama", "peft", "matplotlib.pyplot",
]  # fmt: skip


@functools.cache
def _server() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


class Python:
    """`python WORDS` as a process of its own, with what tests use of `subprocess.Popen`: `-m MODULE`, `-c CODE` or a
    file, then arguments. Its environment and folder are this process's; `out` is a file that both its streams are
    appended to, and without one `communicate` gives both. With `forks` what it starts with this Python has nothing to
    import either."""

    def __init__(
        self, *words: str, env: dict[str, str] | None = None, out: Path | None = None, forks: bool = False
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="forked-"))
        self.files = [out, out] if out else [self.folder / "out", self.folder / "error"]
        self._start(words, env, {1: str(self.files[0]), 2: str(self.files[1])}, forks)

    def _start(self, words: tuple[str, ...], env: Any, streams: dict[int, str | Connection], forks: bool) -> None:
        how = (words, env or dict(os.environ), os.getcwd(), streams, forks)
        self.process = _server().Process(target=_run, args=how)
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid
        atexit.register(self.close)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout or 0.0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to each stream, once it has ended."""
        self.wait(timeout)
        out, error = (file.read_text(encoding="utf-8") if file.exists() else "" for file in self.files)
        self.close()
        return out, error

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends it where it runs still."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Keeper(Python):
    """What `rollout/remote/launch.py` asks of `subprocess.Popen`: a keeper and the server that it starts, forked."""

    def __init__(self, words: list[str], *, env: dict[str, str], **_: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="forked-"))
        (reads, self.line), (told, writes) = (_server().Pipe(duplex=False) for _ in range(2))
        self._start(tuple(words[2:]), env, {0: reads, 1: writes}, forks=True)  # without python and -I
        reads.close()
        writes.close()
        self.stdout = open(os.dup(told.fileno()), "rb")  # noqa: SIM115
        told.close()

    def communicate(self, last: bytes) -> None:  # type: ignore[override]
        try:
            os.write(self.line.fileno(), last)
        finally:
            self.line.close()
            self.wait()
            self.stdout.close()
            self.close()


ENGINES = SimpleNamespace(Popen=Keeper, PIPE=subprocess.PIPE)
"""Stands for `subprocess` in `rollout/remote/launch.py` where a test's engines are to be forked."""


def steersman(*words: str, env: dict[str, str] | None = None, out: Path | None = None, forks: bool = False) -> Python:
    """`steersman WORDS`."""
    return Python("-m", "steersman", *words, env=env, out=out, forks=forks)


def _run(
    words: tuple[str, ...], env: dict[str, str], folder: str, streams: dict[int, str | Connection], forks: bool
) -> None:
    """Becomes `python WORDS` with these streams: files that are appended to, or pipes."""
    gc.freeze()  # what was imported before the fork stays: looking for garbage there would copy its pages
    # Its own children come of the server that it comes of: one that it started itself would import all again.
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for descriptor, stream in streams.items():
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        file = os.open(stream, append, 0o644) if isinstance(stream, str) else os.dup(stream.fileno())
        os.dup2(file, descriptor)
        os.close(file)
        if not isinstance(stream, str):
            stream.close()
    if 0 in streams:
        sys.stdin = open(0)  # noqa: SIM115
    if forks:
        _fork_what_it_starts()
    _become(words)


def _fork_what_it_starts() -> None:
    """`subprocess.Popen([sys.executable, ...])` forks this process where it would execute a new Python; what comes of
    it starts others as ever."""
    execute = subprocess.Popen._execute_child
    signature = inspect.signature(execute)

    def start(self: Any, *given: Any) -> None:
        how = signature.bind(self, *given).arguments
        words = list(how["args"])
        if words[0] != sys.executable:
            execute(self, *given)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            subprocess.Popen._execute_child = execute
            child = multiprocessing.get_context("fork").Process(target=_instead, args=(how,))
            os._exit(child._bootstrap())  # as multiprocessing ends its own
        self._child_created = True
        self._close_pipe_fds(*(how[name] for name in PIPES))

    subprocess.Popen._execute_child = start


PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
"""What `subprocess` calls the two ends of standard input, output and error; -1 where they are inherited."""


def _instead(how: dict[str, Any]) -> None:
    """What a new Python would find: its streams and no other file, its session, its environment."""
    for descriptor, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if how[name] != -1:
            os.dup2(how[name], descriptor)
    os.closerange(3, 65536)
    if how["start_new_session"]:
        os.setsid()
    if how["preexec_fn"] is not None:
        how["preexec_fn"]()
    if how["env"] is not None:
        os.environ.clear()
        os.environ.update(how["env"])
    _become(tuple(how["args"][1:]))


def _become(words: tuple[str, ...]) -> None:
    """Runs the words of a command line of Python, deaf to no signal."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    first, *rest = words
    if first == "-m":
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
