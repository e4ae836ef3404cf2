"""The other side of `processes.py`: a process that loads the environment once, and forks one process per episode.

    python -m steersman.environments.host SOCKET SECTION

SECTION is the recipe's section as JSON. When its standard input ends, so do this process and all that it forked.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from dataclasses import fields
from multiprocessing.connection import Connection
from typing import Any

from steersman.environments.classes import FaultError
from steersman.environments.config import EnvironmentConfig, open_environment
from steersman.environments.port import Answer, Environment, Episode
from steersman.environments.text import clean_text
from steersman.types import SteersmanError


def main(path: str, section: str) -> None:
    """Forks at every connection, and lets the fork serve it."""
    environment = open_environment(EnvironmentConfig.model_validate_json(section))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen(1024)
        os.rename(f"{path}.new", path)  # what is there can be connected to
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [])
            if sys.stdin in ready:
                os.killpg(0, signal.SIGKILL)
            opened, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                with open(os.devnull) as nothing:
                    os.dup2(nothing.fileno(), 0)
                _serve(environment, Connection(opened.detach()))
                os._exit(0)
            opened.close()


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
                told, episode = None if episode is None else episode.close(), None
            _tell(line, {"told": told})
        except SteersmanError as error:
            _tell(line, {"refused": str(error)})
        except FaultError as error:
            _tell(line, {"fault": str(error)})
        except BaseException as error:
            _tell(line, {"fault": f"{type(error).__name__}: {clean_text(str(error), 300)}"})


def _tell(line: Connection, value: Any) -> None:
    line.send_bytes(json.dumps(value).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
