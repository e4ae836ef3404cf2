"""Episodes in processes of their own: a tool that holds the interpreter, hangs or crashes ends its own episode alone.

One process per episode that is under way, in a session of its own, used again by later ones where the episode left
nothing that runs; forked by a host that has loaded the environment (`host.py`). What comes back from them is read as
JSON: nothing that a tool does there runs anything here.
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
_HOSTS = 3
"""Hosts that may end while they are asked for one process."""


class ProcessEnvironment(EnvironmentAround):
    """`inner` says what the environment is; its episodes are played in processes that `section` (JSON) describes.

    Raises SteersmanError where processes can't be forked.
    """

    def __init__(self, inner: Environment, section: str, time_limit: float) -> None:
        if sys.platform == "win32":
            raise SteersmanError("environment.run_in: processes needs fork, which Windows has not; use threads")
        super().__init__(inner)
        self.section, self.time_limit = section, time_limit
        self._lock, self._idle = threading.Lock(), list[Player]()
        self._host: Host | None = None

    def describe(self) -> str:
        return f"{self.inner.describe()}, in processes"

    def open(self) -> Episode:
        for _ in range(_HOSTS):
            with self._lock:
                host = self._running_host()
                if self._idle:
                    return ProcessEpisode(self, self._idle.pop())
            try:
                return ProcessEpisode(self, host.player())
            except (EOFError, OSError) as error:
                if not host.ends():
                    raise FaultError("its process ended as it began") from error
        raise SteersmanError(
            f"environment.run_in: the process that forks those of the episodes was ended {_HOSTS} times in a row. "
            "Something ends it, such as a tool that signals its parent: mend that, or use threads"
        )

    def _running_host(self) -> Host:
        """The host, or, where it has ended, another; all that it forked have ended with it. The lock is held."""
        if self._host is None or self._host.ended:
            for player in self._idle:
                player.end()
            self._idle.clear()
            self._host = Host(self.section)
        return self._host

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
        player = self.player
        if player.gone:
            return
        if player.asked.locked():  # another thread waits for its answer: the run is ended
            return player.kill()
        try:
            left = self._ask("close")
        except BaseException:
            player.end()
            raise
        if left:
            player.end()
        else:
            self.environment.back(player)

    def _ask(self, what: str, *words: Any) -> Any:
        return self.player.ask(what, words, self.environment.time_limit)


class Player:
    """The process at the other end of a line, and the group of those that it started. `asked` is locked while an
    answer is waited for. Raises EOFError or OSError where it ends before it has said a word."""

    def __init__(self, line: Connection) -> None:
        self.line, self.gone, self.asked = line, False, threading.Lock()
        if not line.poll(_LOADING):
            raise SteersmanError(
                f"environment.run_in: no process was forked within {_LOADING:g} s; is the host stopped?"
            )
        self.pid = int(self._read()["pid"])

    def ask(self, what: str, words: tuple[Any, ...], limit: float) -> Any:
        """What it answers. Raises FaultError for what failed there, or where it ended; TooLateError, and ends it,
        after `limit` seconds."""
        try:
            with self.asked:
                self.line.send((what, words))
                if not self.line.poll(limit):
                    self.end()
                    raise TooLateError
                told = self._read()
        except (EOFError, OSError, ValueError) as error:
            self.end()
            raise FaultError("its process ended: it crashed, or was ended") from error
        if "refused" in told:
            raise SteersmanError(told["refused"])
        if "fault" in told:
            fault = FaultError(told["fault"])
            if told["trace"]:
                fault.add_note(told["trace"])  # a traceback is written with its notes
            raise fault
        return told["told"]

    def end(self) -> None:
        """Ends it and its group; it is asked nothing any more."""
        self.gone = True
        self.line.close()
        self.kill()

    def kill(self) -> None:
        """Ends it and its group; whoever waits for its answer is told."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _read(self) -> dict[str, Any]:
        return parse_json(self.line.recv_bytes(_LARGEST).decode(), "an environment's process")


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
                self.process.wait()
                raise SteersmanError("environment.run_in: the process that loads the environment ended; see above")
            time.sleep(0.02)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def ends(self) -> bool:
        """Whether it has ended, or does within a second."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        return self.ended

    def player(self) -> Player:
        """A new process. Raises EOFError or OSError where this one, or the new one, has ended."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self.path))
            return Player(Connection(line.detach()))
