"""The folder that a process and its servers share, and what is done about those of processes that were killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from steersman.types import SteersmanError

MEMORY = Path("/dev/shm")
PREFIX = "steersman-"


class SharedFolder:
    """A folder of this process's own, in the given one or in shared memory (or else where temporary files are).

    In shared memory the process holds a lock on it, which its death releases, however it dies; folders whose lock
    nobody holds any more are removed first. So a process that was killed, and the keepers of its servers with it,
    leave memory taken only until the next run begins. A folder that is given may lie on a file system that several
    machines see, where such locks say little: there a keeper alone removes what was left.

    Raises SteersmanError where the given folder is not there, or can not be written into.
    """

    def __init__(self, inside: str | None = None) -> None:
        self._lock: int | None = None
        if inside is None and MEMORY.is_dir():
            sweep()
            self.path = self._locked()
        else:
            try:
                self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=inside))
            except OSError as error:
                raise SteersmanError(
                    f"rollout.folder: {inside}: no folder can be made there ({error.strerror})"
                ) from error
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def _locked(self) -> Path:
        while True:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=MEMORY))
            self._lock = _try(path, fcntl.LOCK_SH)
            if self._lock is not None and path.exists():  # another process's sweep may come before the lock
                return path
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Removes the folder and what is in it; nothing happens where it is gone. The process's end does it too."""
        self._finalizer()
        self._release()


def sweep() -> None:
    """Removes this user's folders in shared memory whose process is gone."""
    for path in MEMORY.glob(f"{PREFIX}*"):
        if path.is_dir() and path.stat().st_uid == os.getuid() and (lock := _try(path, fcntl.LOCK_EX)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _try(path: Path, how: int) -> int | None:
    """A descriptor with the lock, or None where another process has it, or the folder is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
