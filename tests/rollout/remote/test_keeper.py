"""The keeper leaves nothing behind: no process, no file in shared memory, whoever dies first."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from steersman.rollout.remote import keeper
from steersman.rollout.remote.launch import ServerProcess

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs Linux's shared memory")

SERVER = """
import signal, subprocess, sys, time
from multiprocessing import resource_tracker, shared_memory
held = shared_memory.SharedMemory({name!r}, create=True, size=64)
resource_tracker.unregister(held._name, "shared_memory")
apart = "import time; time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", apart], start_new_session=True)
{more}
print("child", child.pid, flush=True)
time.sleep(600)
"""
POLITE = """
def tidy(*_):
    print("tidied up", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, tidy)
"""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def started(tmp_path: Path, more: str) -> tuple[ServerProcess, Path, int]:
    """A process that holds shared memory and has a child in a session of its own; both, and the child's id."""
    name = f"steersman-test-{uuid4().hex[:8]}"
    script = SERVER.format(name=name, more=more)
    one = ServerProcess("server", lambda _: [sys.executable, "-c", script], tmp_path / "log", timeout=20.0)
    one.start()
    while "child" not in one.output():
        assert one.alive(), one.output()
        time.sleep(0.02)
    file = Path("/dev/shm") / name
    assert file.exists()
    return one, file, int(one.output().split("child")[1].split()[0])


def gone(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def soon(condition, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_a_server_is_asked_to_end_before_it_is_killed(tmp_path):
    one, file, child = started(tmp_path, POLITE)
    one.stop()
    assert "tidied up" in one.output()
    assert not one.alive()
    assert gone(child)  # in another session, so no signal to the group would reach it
    assert not file.exists()


@pytest.mark.slow
def test_a_server_that_does_not_end_is_killed_after_a_grace(tmp_path, monkeypatch):
    short = tmp_path / "keeper.py"
    short.write_text(Path(keeper.__file__).read_text().replace("GRACE = 15.0", "GRACE = 0.5"))
    from steersman.rollout.remote import launch

    monkeypatch.setattr(launch, "KEEPER", short)
    one, file, child = started(tmp_path, DEAF)
    one.stop()
    assert gone(one.pid)
    assert gone(child)
    assert not file.exists()


def test_shared_memory_of_a_server_that_was_killed_is_removed(tmp_path):
    one, file, child = started(tmp_path, "")
    time.sleep(1.5 * keeper.LOOK)  # the keeper has looked
    os.kill(one.pid, signal.SIGKILL)
    assert soon(lambda: gone(child) and not file.exists())
    one.stop()


def test_what_was_there_before_stays(tmp_path):
    before = Path("/dev/shm") / f"steersman-test-{uuid4().hex[:8]}"
    before.write_bytes(b"another's")
    more = f"import mmap; f = open({str(before)!r}, 'r+b'); m = mmap.mmap(f.fileno(), 0)"
    one, file, _ = started(tmp_path, more)
    one.stop()
    assert not file.exists()
    assert before.read_bytes() == b"another's"
    before.unlink()


def test_a_keeper_that_is_killed_takes_the_server_along(tmp_path):
    one, file, _ = started(tmp_path, POLITE)
    assert one._keeper is not None
    os.kill(one._keeper.pid, signal.SIGKILL)
    assert soon(lambda: not one.alive())
    assert "tidied up" in one.output()
    one.stop()
    file.unlink(missing_ok=True)
