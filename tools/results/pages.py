"""A `steersman collect` of one's own, in a process that can be killed."""

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
    """The address of a server and its process; it is ended with the block."""
    port = free_port()
    server = started(port, *arguments)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.terminate()
        server.wait(60)


def started(port: int, *arguments: str) -> Server:
    """A server that answers already."""
    command = [sys.executable, "-m", "steersman", "collect", *arguments, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}/login", time.monotonic() + 180
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return server
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the server at {url} did not come up")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
