"""Folders in shared memory go with their process, however it ends; those of living ones stay."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from steersman.rollout.remote.shared_folder import MEMORY, SharedFolder, sweep

pytestmark = pytest.mark.skipif(not MEMORY.is_dir(), reason="needs Linux's shared memory")


def elsewhere(after: Callable[[], None]) -> tuple[int, Path]:
    """A process that makes a folder with a file in it and goes on with `after`; its id, and the path."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        folder = SharedFolder()
        (folder.path / "weights").write_bytes(b"1" * 100)
        os.write(writes, f"{folder.path}\n".encode())
        after()
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as told:
        return pid, Path(told.readline().strip())


def test_what_a_killed_process_left_is_removed_by_the_next_and_a_living_ones_is_not() -> None:
    killed, left = elsewhere(lambda: time.sleep(600))
    living, used = elsewhere(lambda: time.sleep(600))
    try:
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        assert (left / "weights").exists()
        mine = SharedFolder()
        assert not left.exists()
        assert (used / "weights").exists()
        sweep()
        assert mine.path.is_dir(), "a process does not remove its own"
        mine.remove()
        assert not mine.path.exists()
    finally:
        os.kill(living, signal.SIGKILL)
        os.waitpid(living, 0)
        sweep()
    assert not used.exists()


def test_other_programs_files_stay() -> None:
    other = MEMORY / f"other-{os.getpid()}"
    other.mkdir()
    try:
        sweep()
        assert other.is_dir()
    finally:
        other.rmdir()


def test_a_folder_that_is_given_is_used_and_removed(tmp_path: Path) -> None:
    folder = SharedFolder(str(tmp_path))
    assert folder.path.parent == tmp_path
    del folder
    assert list(tmp_path.iterdir()) == []
