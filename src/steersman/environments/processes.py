"""Episodes in processes of their own: a tool that holds the interpreter, hangs or crashes ends its own episode alone.

One process per episode that is under way, used again by later ones; forked by a host that has loaded the environment
(`host.py`). What comes back from them is read as JSON: nothing that a tool does there runs anything here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from steersman.data.examples import Message
from steersman.environments.classes import FaultError
from steersman.environments.port import Answer, Environment, EnvironmentAround, Episode, Reply
from steersman.environments.workers import TooLateError
from steersman.guards.untrusted import parse_json
from steersman.types import SteersmanError

_LOADING = 300.0
"""Seconds that the host may take to load the environment."""
_LARGEST = 64 << 20
"""Bytes of one answer."""


class ProcessEnvironment(EnvironmentAround):
    """`inner` says what the environment is; its episodes are played in processes that `section` (JSON) describes.

    Raises SteersmanError where processes can't be forked.
    """

    def __init__(self, inner: Environment, section: str, time_limit: float) -> None:
        if sys.platform == "win32":
            raise SteersmanError("environment.run_in: processes needs fork, which Windows has not; use threads")
        super().__init__(inner)
        self.section, self.time_limit = section, time_limit
        self._lock, self._idle, self._host = threading.Lock(), list[Player](), list[Host]()

    def describe(self) -> str:
        return f"{self.inner.describe()}, in processes"

    def open(self) -> Episode:
        with self._lock:
            if self._idle:
                return ProcessEpisode(self, self._idle.pop())
            if not self._host:
                self._host.append(Host(self.section))
        return ProcessEpisode(self, self._host[0].player())

    def back(self, player: Player) -> None:
        """Takes a process back whose episode is over."""
        with self._lock:
            self._idle.append(player)


class ProcessEpisode:
    """One episode, played elsewhere."""

    def __init__(self, environment: ProcessEnvironment, player: Player) -> None:
        self.environment, self.player = environment, player

    def begin(self, messages: list[Message], row: dict[str, Any], seed: int) -> list[Message]:
        return self._ask("begin", messages, row, seed)

    def step(self, reply: Reply) -> Answer:
        return Answer(**self._ask("step", reply))

    def close(self) -> None:
        if not self.player.gone:
            self._ask("close")
            self.environment.back(self.player)

    def _ask(self, what: str, *words: Any) -> Any:
        return self.player.ask(what, words, self.environment.time_limit)


class Player:
    """The process at the other end of a line."""

    def __init__(self, line: Connection) -> None:
        self.line, self.gone = line, False
        self.pid = int(self._read(_LOADING)["pid"])

    def ask(self, what: str, words: tuple[Any, ...], limit: float) -> Any:
        """What it answers. Raises FaultError for what failed there, or where it ended; TooLateError, and ends it,
        after `limit` seconds."""
        try:
            self.line.send((what, words))
            told = self._read(limit)
        except (EOFError, OSError, ValueError) as error:
            self._end()
            raise FaultError("its process ended: it crashed, or was ended") from error
        if "refused" in told:
            raise SteersmanError(told["refused"])
        if "fault" in told:
            raise FaultError(told["fault"])
        return told["told"]

    def _read(self, limit: float) -> dict[str, Any]:
        if not self.line.poll(limit):
            self._end()
            raise TooLateError()
        return parse_json(self.line.recv_bytes(_LARGEST).decode(), "an environment's process")

    def _end(self) -> None:
        self.gone = True
        self.line.close()
        with suppress(AttributeError, ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Host:
    """The process that forks players. It ends, with all of them, when this one does."""

    def __init__(self, section: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="steersman-")
        self.path = Path(self.folder.name) / "host"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "steersman.environments.host", str(self.path), section],
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        until = time.monotonic() + _LOADING
        while not self.path.exists():
            if self.process.poll() is not None or time.monotonic() > until:
                self.process.kill()
                raise SteersmanError("environment.run_in: the process that loads the environment ended; see above")
            time.sleep(0.02)

    def player(self) -> Player:
        """A new process."""
        line = socket.socket(socket.AF_UNIX)
        line.connect(str(self.path))
        return Player(Connection(line.detach()))
