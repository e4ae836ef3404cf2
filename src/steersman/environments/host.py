"""The other side of `processes.py`: a process that loads the environment once, and forks one process per episode.

    python -m steersman.environments.host SOCKET SECTION

SECTION is the recipe's section as JSON. When its standard input ends, so do this process and all that it forked. Each
fork leads a session of its own, so that a tool that ends its process group ends its own episode alone.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import fields
from multiprocessing.connection import Connection
from typing import Any

from steersman.distributed.descendants import adopt_orphans, children, die_with_parent
from steersman.environments.classes import FaultError
from steersman.environments.config import EnvironmentConfig, open_environment
from steersman.environments.port import Answer, Environment, Episode
from steersman.environments.text import clean_text
from steersman.guards.raised import place_of
from steersman.types import SteersmanError


def main(path: str, section: str) -> None:
    """Forks at every connection, and lets the fork serve it."""
    environment = open_environment(EnvironmentConfig.model_validate_json(section))
    players = Players()
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen(1024)
        os.rename(f"{path}.new", path)  # what is there can be connected to
        while True:
            ready, _, _ = select.select([server, sys.stdin, wake], [], [])
            if sys.stdin in ready:
                players.end()
                os.killpg(0, signal.SIGKILL)
            if wake in ready:
                wake.recv(1 << 16)
                players.sweep()
            if server not in ready:
                continue
            opened, _ = server.accept()
            if players.fork():
                opened.close()
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (server, wake, woken):
                end.close()
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
            _serve(environment, Connection(opened.detach()))
            os._exit(0)


class Players:
    """The processes that this one has forked, and what those leave behind: on Linux it is adopted, and ended too."""

    def __init__(self) -> None:
        adopt_orphans()
        self.pids: set[int] = set()
        self.kept = children()  # the environment's own, started while it was loaded

    def fork(self) -> int:
        """As `os.fork`."""
        host, pid = os.getpid(), os.fork()
        if pid:
            self.pids.add(pid)
            return pid
        os.setsid()
        die_with_parent()
        adopt_orphans()
        if os.getppid() != host:  # it ended before the line above
            os._exit(1)
        return 0

    def sweep(self) -> None:
        """Takes leave of those that have ended, and ends what they left."""
        while pid := _ended_child():
            self.pids.discard(pid)
        for left in children() - self.pids - self.kept:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(left, signal.SIGKILL)

    def end(self) -> None:
        """Ends all of them with what they started, within two seconds."""
        for pid in self.pids:
            for send in (os.kill, os.killpg):  # one that has just been forked leads no group yet
                with suppress(ProcessLookupError, PermissionError):
                    send(pid, signal.SIGKILL)
        until = time.monotonic() + 2
        while (self.pids or children() - self.kept) and time.monotonic() < until:
            self.sweep()
            time.sleep(0.01)


def _ended_child() -> int:
    """The id of a child that has ended, which is forgotten; 0 where none has."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return 0


def _left_running() -> bool:
    """Whether anything that this process started still runs."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _serve(environment: Environment, line: Connection) -> None:
    """Plays episodes, one after the other, as the other side asks."""
    _tell(line, {"pid": os.getpid()})
    episode: Episode | None = None
    while True:
        try:
            what, words = line.recv()
        except EOFError:
            return
        try:
            if what == "begin":
                episode = environment.open()
                told: Any = episode.begin(*words)
            elif what == "step":
                assert episode is not None
                answer = episode.step(*words)
                told = {field.name: getattr(answer, field.name) for field in fields(Answer)}
            else:
                if episode is not None:
                    episode.close()
                told, episode = _left_running(), None
            _tell(line, {"told": told})
        except SteersmanError as error:
            _tell(line, {"refused": str(error)})
        except FaultError as error:
            _tell(line, {"fault": str(error), "trace": _trace(error) if error.__cause__ is not None else ""})
        except BaseException as error:
            fault = f"{type(error).__name__}: {clean_text(str(error), 300)}{place_of(error)}"
            _tell(line, {"fault": fault, "trace": _trace(error)})


def _trace(error: BaseException) -> str:
    return clean_text("".join(traceback.format_exception(error)), 20_000)


def _tell(line: Connection, value: Any) -> None:
    line.send_bytes(json.dumps(value).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
