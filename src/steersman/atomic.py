"""Files and folders that are whole or not there, whenever the process dies.

A file or folder that is being written has a name that starts with `.tmp-` until it is whole; then it is renamed.
Nothing here writes through a link: in a run folder that came from somebody else one may lead to any file of the
user's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

from steersman.types import SteersmanError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TMP, _OLD, _LOCK = ".tmp-", ".old-", ".lock-"


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes the file beside its place, flushes it to the disk and renames it: whole or as it was before.

    Raises SteersmanError where the disk is full or the place can not be written.
    """
    # Half a surrogate pair becomes its escape, which JSON reads back.
    raw = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    tmp = path.with_name(f"{_TMP}{path.name}")
    with saving(path):
        try:
            with _new(tmp) as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
            flush_to_disk(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


def unlinked(path: str, flags: int) -> int:
    """An `opener` for `open`, for files that are added to or locked: a descriptor, never one through a link.

    Raises SteersmanError where the path is a link, OSError as `open` does.
    """
    refuse_links(Path(path))
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)  # a link that was put there just now is an OSError


def refuse_links(*paths: Path) -> None:
    """Raises SteersmanError naming the first path that is a link, whether or not it leads anywhere."""
    for path in paths:
        if path.is_symlink():
            raise SteersmanError(
                f"{path}: it is a link (to {os.readlink(path)}), and what is written here is not written through "
                "links; remove the link, or name the file itself"
            )


def _new(tmp: Path) -> BufferedWriter:
    """A file of this name that was not there before; whatever had the name is gone."""
    tmp.unlink(missing_ok=True)
    return open(tmp, "xb", opener=unlinked)


def remove_folder(path: Path) -> None:
    """Removes a folder with what is in it, as far as that can be done; of a link the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_now(file: FileIO, text: str) -> None:
    """Writes to an unbuffered file (`buffering=0`): where the disk is full it is said here, and not once more by
    whoever closes the file."""
    raw = text.encode(errors="backslashreplace")
    while raw:
        raw = raw[file.write(raw) :]


def check_places(*files: str | Path | None) -> None:
    """Raises SteersmanError where `write_atomic` could not write a file; for asking before the work that it holds.
    None is no file."""
    for file in files:
        if file is not None:
            _check_place(Path(file))


def _check_place(file: Path) -> None:
    if file.is_dir():
        raise SteersmanError(f"{file}: a folder has this name; name a file")
    if not file.parent.is_dir():
        raise SteersmanError(f"{file}: there is no folder {file.parent}; make it first, or name another file")
    tmp = file.with_name(f"{_TMP}{file.name}")
    with saving(file):
        _new(tmp).close()
        tmp.unlink()


def save_dir(final: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a temporary folder beside `final`, then puts it in its place whole.

    Where `write` fails nothing of it is left and an earlier `final` stays as it was.
    Raises SteersmanError where the disk is full.
    """
    tmp = begin_dir(final)
    with saving(final):
        try:
            write(tmp)
            replace_dir(tmp, final)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def begin_dir(final: Path) -> Path:
    """An empty temporary folder beside `final`, for `replace_dir` to put in its place.

    Raises SteersmanError where the disk is full.
    """
    tmp = final.with_name(f"{_TMP}{final.name}")
    with saving(final):
        remove_folder(tmp)
        tmp.mkdir(parents=True)
    return tmp


def replace_dir(tmp: Path, final: Path) -> None:
    """Flushes every file of `tmp` to the disk and renames it to `final`, which it replaces.

    There is no rename that swaps folders, so an earlier `final` steps aside first; `recover` puts it back where
    a kill came between the two renames.
    """
    for file in tmp.rglob("*"):
        if file.is_file():
            flush_to_disk(file)
    for folder in [*(p for p in tmp.rglob("*") if p.is_dir()), tmp]:
        flush_to_disk(folder)
    old = final.with_name(f"{_OLD}{final.name}")
    if final.exists() or final.is_symlink():
        remove_folder(old)
        os.rename(final, old)
    os.rename(tmp, final)
    flush_to_disk(final.parent)
    remove_folder(old)


@contextmanager
def locked(final: Path) -> Iterator[None]:
    """Keeps all others who ask for the same, threads and processes, out until the end of the block; waits for them
    first.

    `final` need not be there: the lock is on a file beside it, which is removed at the end. The system takes the lock
    away from a process that dies. On network file systems it holds between machines where the mount has locks.

    Raises SteersmanError where the place can not be written or has no locks.
    """
    path = final.with_name(f"{_LOCK}{final.name}")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
    try:
        yield
    finally:
        with file:
            path.unlink(missing_ok=True)


def _open_locked(path: Path) -> BufferedWriter:
    while True:
        file = open(path, "ab", opener=unlinked)  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held it before has removed the file; then the lock of this one keeps nobody out. It is opened
            # again, since what a network file system knows of a name may be old otherwise.
            with path.open("rb") as now:
                if os.path.samestat(os.fstat(now.fileno()), os.fstat(file.fileno())):
                    return file
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                file.close()
                raise SteersmanError(
                    f"{path}: it can not be locked ({error.strerror}), and without a lock runs would write over each "
                    "other; name a folder on a file system with locks"
                ) from error
        file.close()


def recover(folder: Path) -> None:
    """Clears what a killed process left half-written in `folder`, and puts back what had stepped aside."""
    for old in folder.glob(f"{_OLD}*"):
        final = old.with_name(old.name.removeprefix(_OLD))
        if final.exists():
            remove_folder(old)
        else:
            os.rename(old, final)
    for tmp in folder.glob(f"{_TMP}*"):
        if tmp.is_dir():
            remove_folder(tmp)
        else:
            tmp.unlink(missing_ok=True)


@contextmanager
def saving(what: Path, who: str = "") -> Iterator[None]:
    """Turns a full disk, however the library below reports it, and any other failure of the system's to write into
    a SteersmanError that names `what`, behind `who` such as `rank 1: `."""
    try:
        yield
    except SteersmanError:
        raise
    except Exception as error:
        if _is_full(error):
            free = shutil.disk_usage(what.parent).free / 2**20 if what.parent.exists() else 0.0
            raise SteersmanError(
                f"{who}{what}: the disk is full (or a size limit was reached) while saving; {free:.0f} MiB are free "
                "there. What was saved before is untouched: make room and run again (a run with --resume)"
            ) from error
        if isinstance(error, OSError):
            raise SteersmanError(f"{who}{what}: it can not be written ({error.strerror or error})") from error
        raise


def _is_full(error: BaseException | None) -> bool:
    """Whether the error or what caused it is a full disk; torch and safetensors keep only the words."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        words = (
            "No space left on device",
            "File too large",
            "Disk quota exceeded",
            "file write failed",
            "iostream error",
        )
        if any(w in str(error) for w in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
