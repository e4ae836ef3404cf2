"""A `steersman collect` of one's own, in a process that can be killed.

Its store has no account, so a browser enters by the link that it prints.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

Server = subprocess.Popen[bytes]


@contextmanager
def collecting(*arguments: str) -> Iterator[tuple[str, Server]]:
    """The link into a server and its process; it is ended with the block."""
    link, server = started(free_port(), *arguments)
    try:
        yield link, server
    finally:
        server.terminate()
        server.wait(60)


def started(port: int, *arguments: str) -> tuple[str, Server]:
    """The link into a server that answers already, and its process."""
    command = [sys.executable, "-m", "steersman", "collect", *arguments, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 180
    assert server.stdout is not None
    link = next((line.split()[0] for line in map(bytes.decode, server.stdout) if line.startswith(url)), url)
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/login", timeout=5).close()
            return link, server
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the server at {url} did not come up")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
