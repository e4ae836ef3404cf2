"""The run folder: one run per folder, one process per folder.

    config.yaml    the resolved recipe          metrics.jsonl, samples.jsonl, health.jsonl   (log.py beside this),
                                                and evaluation.jsonl where the recipe evaluates
    inputs.json    digests of data and models   (inputs.py)
    checkpoints/   (checkpoint.py)              summary.json, report.html                    (run/report/page.py)
    reference/     what a frozen reference says of the data (setup/reference.py)
    tracker-id     what stands for the run in trackers of numbers (sinks.py)
    tracebacks.txt what code of the user's raised, whole (guards/raised.py)

Every file is whole or not there (`steersman/atomic.py`).
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from steersman.atomic import recover, saving, unlinked, write_atomic, write_now
from steersman.config.dump import changed_keys, dump_recipe
from steersman.config.load import with_new_defaults
from steersman.config.recipe_text import load_yaml
from steersman.config.sections import Section
from steersman.distributed.ranks import ranks
from steersman.guards.raised import Tracebacks, kept
from steersman.run.files.inputs import check_inputs, inputs_of
from steersman.types import SteersmanError

held: list[Path] = []
"""Folders that this process has held, newest last: the command line says where a failed run has its files."""

IDENTITY = "tracker-id"
"""What stands for the run in trackers of numbers (sinks.py)."""

TRACEBACKS = "tracebacks.txt"
"""What code of the user's raised. It stays where the run is taken back, since the message points to it."""

BEGINNINGS = ("config.yaml", "inputs.json", "metrics.jsonl", "report.html", IDENTITY)
"""What a run writes before its first step or round."""


def holds_run(path: Path) -> bool:
    """Whether a run began in this folder."""
    return any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints"))


class RunFolder:
    """A folder that this process alone may write to until `close` (or the end of a `with` block).

    `resumed` is True where `resume` was asked for and the folder holds a run already; `changes` then lists
    the settings that differ from that run's, such as "train.lr: 0.001 -> 0.0003".

    Raises SteersmanError where the folder can not be made, holds a run and `resume` is False, is held by another
    process (which is named by its pid), holds a run of another verb, or where data or models have another content
    than when the run began.
    """

    def __init__(self, path: Path, recipe: Section, *, resume: bool = False) -> None:
        self.path = Path(path)
        self._made, self.resumed = not self.path.exists(), True  # until it is known that no run is there
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Append mode: opening must not wipe the pid that the holder wrote.
            self._lock = open(self.path / ".lock", "a+b", buffering=0, opener=unlinked)  # noqa: SIM115
        except OSError as error:
            raise SteersmanError(
                f"run folder {self.path}: it can not be made ({error.strerror}); choose another --run.dir"
            ) from None
        try:
            self._take_lock()
            self.resumed = holds_run(self.path)
            if self.resumed and not resume:
                raise SteersmanError(
                    f"run folder {self.path}: it holds another run already; continue that one with --resume, "
                    "or choose another --run.dir"
                )
            self.changes: list[str] = []
            recover(self.path)
            inputs = inputs_of(recipe, self.path)
            if self.resumed:
                check_inputs(self.path / "inputs.json", inputs)
            else:
                (self.path / TRACEBACKS).unlink(missing_ok=True)  # of a run that was refused here
            self._write_config(recipe)
            write_atomic(self.path / "inputs.json", json.dumps(inputs, indent=1))
        except BaseException:
            if self.resumed:
                self._leave()
            else:
                self.forget()
            self._lock.close()
            raise
        held.append(self.path)
        self._tracebacks = Tracebacks(self.path / TRACEBACKS, write_atomic)
        kept.append(self._tracebacks)

    def close(self) -> None:
        """Lets go of the folder; a second call does nothing."""
        self._lock.close()
        if self._tracebacks in kept:
            kept.remove(self._tracebacks)

    def forget(self) -> None:
        """Takes back what says that a run is here, and the folder where it was made for it and nothing else is in it:
        what was refused before it began is no run, and the mended recipe may use the name."""
        for name in BEGINNINGS:
            (self.path / name).unlink(missing_ok=True)
        for name in ("samples.jsonl", "health.jsonl"):
            if (self.path / name).exists() and not (self.path / name).stat().st_size:
                (self.path / name).unlink()
        self._leave()
        if self.path in held:
            held.remove(self.path)

    def _leave(self) -> None:
        if self._made and [entry.name for entry in self.path.iterdir()] == [".lock"]:
            (self.path / ".lock").unlink()
            self.path.rmdir()

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
            self._made = False  # or by both at the same moment, and the other has it
            self._lock.seek(0)
            holder = self._lock.read().decode("ascii", "replace").strip() or "unknown"
            raise SteersmanError(
                f"run folder {self.path}: process {holder} is writing to it; wait for it, stop it "
                f"(kill {holder}), or choose another --run.dir"
            ) from None
        with saving(self.path / ".lock"):
            self._lock.seek(0)
            self._lock.truncate()
            write_now(self._lock, str(os.getpid()))

    def _write_config(self, recipe: Section) -> None:
        file, text = self.path / "config.yaml", dump_recipe(recipe)
        if file.exists():
            before = file.read_text(encoding="utf-8")
            earlier = load_yaml(before, type(recipe)) or {}
            self.changes = changed_keys(with_new_defaults(type(recipe), earlier), load_yaml(text))
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
