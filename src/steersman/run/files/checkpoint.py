"""Checkpoints that are whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.atomic import begin_dir, recover, remove_folder, replace_dir, saving, write_atomic
from steersman.distributed.pieces import copy_to_cpu
from steersman.distributed.ranks import Ranks, ranks
from steersman.distributed.stored import mark_shards, replace_marks, size_and_digest, write_shards
from steersman.types import Stats, SteersmanError

ADDED = "settled.pt"
"""In a checkpoint's folder: what `Checkpointer.settle` added."""


@dataclass(slots=True)
class Checkpoint:
    """What was saved after `step` steps."""

    step: int
    state: dict[str, Any]
    metrics: Stats
    path: Path


class Checkpointer:
    """Saves and finds `checkpoints/step-N` of a run folder; keeps the last few and the best few.

    `state` is nested dicts and lists of tensors, numbers, strings and None: what `torch.load` reads with
    `weights_only=True`, so that opening a checkpoint runs no code of its maker. A manifest with the size and
    SHA-256 of each file, and the SHA-256 of its own fields, tells a whole checkpoint from a damaged one.
    `damaged` has a line for each damaged checkpoint that was passed over.

    `metric` (of the stats given to `save`) ranks checkpoints; `mode` says whether more is better.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        metric: str | None = None,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        if keep_last < 1:
            raise SteersmanError(f"keep_last is {keep_last}, but at least 1 checkpoint must stay to resume from")
        self.folder = Path(folder) / "checkpoints"
        self.keep_last, self.keep_best, self.metric, self.mode = keep_last, keep_best, metric, mode
        self.damaged: list[str] = []
        self._writing: Future[None] | None = None
        self._beside: Ranks | None = None
        if self.folder.exists():
            recover(self.folder)

    def save(
        self,
        step: int,
        state: dict[str, Any],
        metrics: Stats | None = None,
        *,
        wait: bool = True,
        settled: bool = True,
    ) -> Path:
        """Writes the checkpoint whole, then drops the ones that need not be kept; none before it is `settled`.

        All ranks call it: rank 0 writes, and every rank the pieces of tensors that it holds. Without `wait` the state
        is copied and written on a thread, and the checkpoint is there once that is done.

        Raises SteersmanError where the disk is full; earlier checkpoints stay. What failed on a thread is raised by
        the next call of `save` or `wait`.
        """
        self.wait()
        kept = {k: v for k, v in (metrics or {}).items() if math.isfinite(v)}
        path = self.folder / _name(step)
        if wait:
            self._write(path, step, state, kept, ranks(), settled=settled)
            return path
        self._beside = self._beside or ranks().beside()
        copy, beside = copy_to_cpu(state), self._beside
        self._writing = in_background(lambda: self._write(path, step, copy, kept, beside, settled=settled))
        return path

    def settle(self, step: int, state: dict[str, Any], metrics: Stats) -> None:
        """Adds to the checkpoint of this step what was learned of it since it was saved: `load` gives `state` for
        what it held under these names, and `metrics` rank it. Then drops the ones that need not be kept.

        All ranks call it. Raises SteersmanError where the disk is full; the checkpoint is then as it was.
        """
        self.wait()
        path = self.folder / _name(step)

        def add() -> None:
            manifest = _manifest(path)
            if not manifest:  # somebody removed it meanwhile
                return
            with saving(path):
                packed = io.BytesIO()
                torch.save(state, packed)
                write_atomic(path / ADDED, packed.getvalue())
                manifest["metrics"] = {k: v for k, v in metrics.items() if math.isfinite(v)}
                manifest["files"][ADDED] = size_and_digest(path / ADDED)
                write_atomic(path / "manifest.json", _signed(manifest))
            self._drop_old()

        ranks().from_main(add, "a checkpoint")

    def drop(self, step: int) -> None:
        """Removes the checkpoint of this step. All ranks call it."""
        self.wait()
        ranks().from_main(lambda: _remove(self.folder / _name(step)), "a checkpoint")

    def wait(self) -> None:
        """Waits for the checkpoint that is still being written, and raises what went wrong with it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    @property
    def failed(self) -> bool:
        """Whether a checkpoint that was written on a thread could not be; `wait` raises why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def latest(self) -> Path | None:
        """The newest whole checkpoint, None where there is none at all; `damaged` names each newer one.

        Raises SteersmanError where there are checkpoints and all are damaged.
        """
        self.wait()
        self.damaged = []
        for path in reversed(self._paths()):
            damage = damage_of(path)
            if damage is None:
                return path
            self.damaged.append(f"checkpoint {path} is damaged ({damage}); using the one before it")
        if self.damaged:
            raise SteersmanError(
                f"{self.folder}: no checkpoint is whole: "
                + "; ".join(f"{p.name}: {damage_of(p)}" for p in self._paths())
                + ". To train again from the start, remove this folder"
            )
        return None

    def best(self) -> Path | None:
        """The whole checkpoint with the best metric, None where none carries it."""
        self.wait()
        ranked = [p for p in self._ranked() if damage_of(p) is None]
        return ranked[0] if ranked else None

    def load(self, path: Path | None = None) -> Checkpoint | None:
        """The checkpoint at `path`, or the newest whole one; tensors come to the CPU, and those that were saved in
        pieces stay on the disk until they are read (`distributed/stored.py`). Rank 0 looks for damage, for all.

        Raises SteersmanError where the one asked for by name is damaged.
        """
        path = ranks().from_main(lambda: self._whole(path), "the newest checkpoint")
        if path is None:
            return None
        manifest = _manifest(path)
        try:
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)
            state = replace_marks(state, path)
            if ADDED in manifest["files"]:
                state |= torch.load(path / ADDED, map_location="cpu", weights_only=True)
        except Exception as error:
            raise SteersmanError(
                f"checkpoint {path}: this version of torch ({torch.__version__}) can not read it: {error}"
            ) from error
        return Checkpoint(manifest["step"], state, manifest["metrics"], path)

    def _whole(self, path: Path | None) -> Path | None:
        if path is None:
            return self.latest()
        damage = damage_of(path)
        if damage is not None:
            raise SteersmanError(f"checkpoint {path}: it is damaged ({damage}); choose another")
        return path

    def _write(
        self, path: Path, step: int, state: dict[str, Any], metrics: Stats, here: Ranks, *, settled: bool
    ) -> None:
        """The manifest comes last and the folder takes its name after it, so a kill leaves the checkpoint before."""
        tmp = here.from_main(lambda: begin_dir(path), "a checkpoint's folder")
        try:
            pieces: dict[str, Tensor] = {}
            rest = mark_shards(state, pieces)
            with saving(path):
                files = write_shards(pieces, tmp, here)

            def finish() -> None:
                self._finish(path, tmp, step, rest, metrics, files)
                if settled:
                    self._drop_old()

            here.from_main(finish, "a checkpoint")
        finally:
            if here.main:
                shutil.rmtree(tmp, ignore_errors=True)

    def _finish(self, path: Path, tmp: Path, step: int, rest: Any, metrics: Stats, files: dict[str, Any]) -> None:
        with saving(path):
            with (tmp / "state.pt").open("wb") as file:
                torch.save(rest, file)
            manifest = {
                "step": step,
                "metrics": metrics,
                "files": {"state.pt": size_and_digest(tmp / "state.pt"), **files},
            }
            (tmp / "manifest.json").write_text(_signed(manifest))
            replace_dir(tmp, path)

    def _paths(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def _ranked(self) -> list[Path]:
        """Checkpoints that carry the metric, best first; of equals the earlier first, as in `train/stopping.py`."""
        sign = -1 if self.mode == "max" else 1
        scored = []
        for age, path in enumerate(self._paths()):
            value = _manifest(path).get("metrics", {}).get(self.metric)
            if value is not None:
                scored.append((sign * value, age, path))
        return [path for _, _, path in sorted(scored)]

    def _drop_old(self) -> None:
        keep = {*self._paths()[-self.keep_last :], *self._ranked()[: self.keep_best]}
        for path in self._paths():
            if path not in keep:
                _remove(path)


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint folder by its manifest, None where it is whole."""
    manifest = _manifest(path)
    if not manifest:
        return "its manifest is missing, cut or changed"
    if path.name != _name(manifest["step"]):
        return f"its manifest is of step {manifest['step']}"
    for name, told in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != told["bytes"]:
            return f"{name} has {file.stat().st_size} of {told['bytes']} bytes"
        if size_and_digest(file)["sha256"] != told["sha256"]:
            return f"{name} does not match its SHA-256"
    return None


def _remove(path: Path) -> None:
    """Renamed first, so that a kill leaves rubbish with a name that says so, not half a checkpoint."""
    rubbish = path.with_name(f".tmp-{path.name}")
    os.rename(path, rubbish)
    remove_folder(rubbish)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _manifest(path: Path) -> dict[str, Any]:
    """The fields of the manifest, empty where its own checksum does not hold."""
    try:
        found = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    told = found.pop("sha256", None)
    return found if told == _digest(found) else {}


def _signed(manifest: dict[str, Any]) -> str:
    """The manifest as its file holds it."""
    return json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1)


def _digest(fields: dict[str, Any]) -> str:
    """SHA-256 of the fields in one fixed spelling."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def in_background(work: Callable[[], None]) -> Future[None]:
    """Does the work on a thread that does not keep the process from ending."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="checkpoint").start()
    return future
