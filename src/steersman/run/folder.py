"""The run folder: one run per folder, one process per folder, every file whole or not there.

    config.yaml    the resolved recipe          metrics.jsonl, samples.jsonl, health.jsonl   (run/log.py)
    inputs.json    digests of data and models   (run/inputs.py)
    checkpoints/   (run/checkpoint.py)          summary.json, report.html                    (run/report/page.py)

A file or folder that is being written has a name that starts with `.tmp-` until it is whole; then it is renamed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steersman.run.config import Section, dump_recipe, load_recipe
from steersman.run.inputs import check_inputs, fingerprints
from steersman.run.ranks import ranks
from steersman.run.recipe_text import load_yaml
from steersman.types import SteersmanError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TMP, _OLD = ".tmp-", ".old-"

held: list[Path] = []
"""Folders that this process has held, newest last: the command line says where a failed run has its files."""


class RunFolder:
    """A folder that this process alone may write to until `close` (or the end of a `with` block).

    `resumed` is True where `resume` was asked for and the folder holds a run already; `changes` then lists
    the settings that differ from that run's, such as "train.lr: 0.001 -> 0.0003".

    Raises SteersmanError where the folder can not be made, holds a run and `resume` is False, is held by another
    process (which is named by its pid), or where data or models have another content than when the run began.
    """

    def __init__(self, path: Path, recipe: Section, *, resume: bool = False) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Append mode: opening must not wipe the pid that the holder wrote.
            self._lock = (self.path / ".lock").open("a+", encoding="ascii")
        except OSError as error:
            raise SteersmanError(
                f"run folder {self.path}: it can not be made ({error.strerror}); choose another --run.dir"
            ) from None
        self._take_lock()
        try:
            holds_run = any((self.path / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints"))
            if holds_run and not resume:
                raise SteersmanError(
                    f"run folder {self.path}: it holds another run already; continue that one with --resume, "
                    "or choose another --run.dir"
                )
            self.resumed = holds_run
            self.changes: list[str] = []
            recover(self.path)
            inputs = fingerprints(recipe, self.path)
            if self.resumed:
                check_inputs(self.path / "inputs.json", inputs)
            self._write_config(recipe)
            write_atomic(self.path / "inputs.json", json.dumps(inputs, indent=1))
        except BaseException:
            self._lock.close()
            raise
        held.append(self.path)

    def close(self) -> None:
        """Lets go of the folder; a second call does nothing."""
        self._lock.close()

    def forget(self) -> None:
        """Takes back what says that a run is here: what was refused before it began is none, and the mended recipe
        may use the folder."""
        for name in ("config.yaml", "inputs.json"):
            (self.path / name).unlink(missing_ok=True)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise SteersmanError(
                f"run folder {self.path}: process {holder} is writing to it; wait for it, stop it "
                f"(kill {holder}), or choose another --run.dir"
            ) from None
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def _write_config(self, recipe: Section) -> None:
        file, text = self.path / "config.yaml", dump_recipe(recipe)
        if file.exists():
            before = file.read_text(encoding="utf-8")
            self.changes = _differences(_resolved(type(recipe), file), text)
            if self.changes:
                taken = len(list(self.path.glob("config.before-resume-*.yaml")))
                write_atomic(self.path / f"config.before-resume-{taken + 1}.yaml", before)
        write_atomic(file, text)


class GuestFolder:
    """The run folder as ranks other than 0 see it: what rank 0 found there, and nothing to write."""

    def __init__(self, path: Path, resumed: bool, changes: list[str]) -> None:
        self.path, self.resumed, self.changes = path, resumed, changes

    def forget(self) -> None:
        return None

    def __enter__(self) -> GuestFolder:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def open_folder(path: Path, recipe: Section, *, resume: bool = False) -> RunFolder | GuestFolder:
    """The run folder, which rank 0 holds; every rank raises what `RunFolder` raises there."""
    opened: list[RunFolder] = []

    def take() -> tuple[bool, list[str]]:
        opened.append(RunFolder(path, recipe, resume=resume))
        return opened[0].resumed, opened[0].changes

    resumed, changes = ranks().from_main(take, "the run folder")
    return opened[0] if opened else GuestFolder(Path(path), resumed, changes)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes the file beside its place, flushes it to the disk and renames it: whole or as it was before.

    Raises SteersmanError where the disk is full or the place can not be written.
    """
    # Half a surrogate pair becomes its escape, which JSON reads back.
    raw = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    tmp = path.with_name(f"{_TMP}{path.name}")
    with saving(path):
        try:
            with tmp.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
            _fsync(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


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
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    return tmp


def replace_dir(tmp: Path, final: Path) -> None:
    """Flushes every file of `tmp` to the disk and renames it to `final`, which it replaces.

    There is no rename that swaps folders, so an earlier `final` steps aside first; `recover` puts it back where
    a kill came between the two renames.
    """
    for file in tmp.rglob("*"):
        if file.is_file():
            _fsync(file)
    for folder in [*(p for p in tmp.rglob("*") if p.is_dir()), tmp]:
        _fsync(folder)
    old = final.with_name(f"{_OLD}{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(tmp, final)
    _fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Clears what a killed process left half-written in `folder`, and puts back what had stepped aside."""
    for old in folder.glob(f"{_OLD}*"):
        final = old.with_name(old.name.removeprefix(_OLD))
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, final)
    for tmp in folder.glob(f"{_TMP}*"):
        if tmp.is_dir():
            shutil.rmtree(tmp, ignore_errors=True)
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
                "there. What was saved before is untouched: make room and run again with --resume"
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


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _resolved(model: type[Section], file: Path) -> str:
    """The recipe of the earlier run with the defaults of keys that there are since then; as it stands where it is no
    recipe of today's."""
    try:
        return dump_recipe(load_recipe(model, file))
    except SteersmanError:
        return file.read_text(encoding="utf-8")


def _differences(before: str, after: str) -> list[str]:
    old, new = _flat(load_yaml(before)), _flat(load_yaml(after))
    keys = [k for k in [*new, *(k for k in old if k not in new)] if old.get(k) != new.get(k)]
    return [f"{k}: {old.get(k, 'not there')} -> {new.get(k, 'not there')}" for k in keys]


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix.rstrip("."): data}
    return {k: v for name, inner in data.items() for k, v in _flat(inner, f"{prefix}{name}.").items()}
