"""Python in processes of its own that need not import everything first: a server that has done so forks them.

A cold `python -m steersman.cli` spends 4 to 5 s of CPU on imports, more than what most tests start it for.
multiprocessing's fork server is a fresh process too, started once by every process of pytest.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOADED = [
    "steersman.cli", "steersman.verbs.sft", "steersman.verbs.preference", "steersman.verbs.reward_model",
    "steersman.verbs.rl", "steersman.flywheel.online_dpo", "steersman.distill.run",
    "transformers.models.llama.modeling_llama",
]  # fmt: skip


@functools.cache
def _server() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


class Python:
    """`python WORDS` as a process of its own, with what tests use of `subprocess.Popen`: `-m MODULE`, `-c CODE` or a
    file, then arguments. Its environment and folder are this process's; `out` is a file that both its streams are
    appended to, and without one `communicate` gives both."""

    def __init__(self, *words: str, env: dict[str, str] | None = None, out: Path | None = None):
        self.folder = Path(tempfile.mkdtemp(prefix="forked-"))
        self.files = [out, out] if out else [self.folder / "out", self.folder / "error"]
        how = (words, env or dict(os.environ), os.getcwd(), [str(file) for file in self.files])
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


def steersman(*words: str, env: dict[str, str] | None = None, out: Path | None = None) -> Python:
    """`steersman WORDS`."""
    return Python("-m", "steersman.cli", *words, env=env, out=out)


def _run(words: tuple[str, ...], env: dict[str, str], folder: str, files: list[str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for descriptor, name in enumerate(files, 1):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
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
