"""Servers that steersman starts, watches and ends itself."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from steersman.distributed.join import free_port
from steersman.guards.terminal import printable
from steersman.rollout.remote.keeper import KEEP
from steersman.rollout.remote.wire import Server, ServerGoneError
from steersman.types import SteersmanError

KEEPER = Path(__file__).with_name("keeper.py")
PORT_TRIES = 3
"""Another program may take a free port between our look and the server's."""
_ROOT = re.compile(
    r"^(?!.*\b(?:WARNING|INFO)\b).*\b(?:[A-Z]\w*(?:Error|Exception)(?=:|$)|Killed\b).*$(?:\n[ \t]+\S.*){0,2}",
    re.MULTILINE,
)
"""An error as Python ends a traceback with it, and the indented lines below it that say what was wrong."""
LONGEST_ROOT = 600
"""Characters of it that a message has."""


class ServerProcess:
    """A server's process: its command is made for a port by `command`, its output goes to a log file, and requests to
    it bear the `key`, which its `environment` tells it.

    It ends when `stop` is called, or when this process ends, however that happens: a keeper holds the other end of a
    pipe. The keeper also removes shared memory that was left, and `folders` where this process ended.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[int], Sequence[str]],
        log: Path,
        *,
        timeout: float,
        environment: Mapping[str, str] | None = None,
        key: str = "",
        folders: Sequence[Path] = (),
    ) -> None:
        self.name, self.command, self.log, self.timeout = name, command, log, timeout
        self.environment, self.folders, self.key = {**os.environ, **(environment or {})}, folders, key
        self.pid = 0
        self.server: Server | None = None
        self._keeper: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process and returns at once; `wait` says when it answers."""
        self.stop()
        self._began = time.monotonic()
        self.server = Server(
            f"http://127.0.0.1:{(port := free_port())}", self.timeout, restartable=True, key=self.key
        )
        self._from = self.log.stat().st_size if self.log.exists() else 0
        words = [sys.executable, "-I", str(KEEPER), str(self.log), *map(str, self.folders), "--", *self.command(port)]
        self._keeper = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment, start_new_session=True
        )
        assert self._keeper.stdout is not None
        told = self._keeper.stdout.readline()
        if not told.strip().isdigit():
            raise SteersmanError(
                f"{self.name}: {words[words.index('--') + 1]} can not be started; see rollout.python"
            )
        self.pid = int(told)

    def wait(self) -> Server:
        """The server once it answers. Raises SteersmanError with the root of the trouble where it ends instead, or
        does not answer in time."""
        for attempt in range(PORT_TRIES):
            while self.alive():
                assert self.server is not None
                if self.server.healthy():
                    return self.server
                if time.monotonic() - self._began > self.timeout:
                    self.stop()
                    raise SteersmanError(
                        f"{self.name}: started, and did not answer within {self.timeout:g} seconds "
                        f"(rollout.timeout). {self.trouble()}"
                    )
                time.sleep(0.05)
            if "ddress already in use" not in self.output() or attempt == PORT_TRIES - 1:
                break
            self.start()
        raise ServerGoneError(f"{self.name}: ended before it answered. {self.trouble()}")

    def alive(self) -> bool:
        """Whether the process is there."""
        if self._keeper is None or not self.pid:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return not _zombie(self.pid)

    def stop(self) -> None:
        """Ends the process and what it started; a second call does nothing."""
        if self.server is not None:
            self.server.close()
        if self._keeper is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._keeper.communicate(KEEP)
        self._keeper = None

    def output(self) -> str:
        """What the process wrote since it was started last, its end at least."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(self._from, self.log.stat().st_size - 200_000))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def trouble(self) -> str:
        """The root of a failure: the first error that its output since its last start names, or else its last line.
        The log itself goes with the run's shared folder, so a message has to hold what matters of it."""
        said = self.output()
        found = _ROOT.search(said)
        lines = said.strip().splitlines()
        root = found[0] if found else lines[-1] if lines else ""
        told = printable(" ".join(root.split()))[:LONGEST_ROOT]
        return f"Its first error: {told}" if told else "It wrote nothing"


def _zombie(pid: int) -> bool:
    """Whether the process has ended and only its parent has not noticed; where there is no /proc, never."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return Path("/proc/self/stat").exists()
