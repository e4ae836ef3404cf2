"""`steersman grue`: the matrix, cell by cell."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from steersman.atomic import unlinked, write_atomic
from steersman.grue.cells import Cell, cell_folder, data_folder, start_model
from steersman.grue.check import check_matrix, room
from steersman.grue.evaluate import judge
from steersman.grue.page import write_pages
from steersman.grue.recipe import SUPERVISED, GrueRecipe
from steersman.grue.results import collect
from steersman.grue.rows import write_rows
from steersman.guards.terminal import printable
from steersman.run.console import new_console
from steersman.run.files.folder import RunFolder
from steersman.run.stop_request import StopRequest
from steersman.types import SteersmanError


def run(recipe: GrueRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Fills the cells that are not done, and writes the pages; returns what summary.json holds.

    The whole matrix is checked first. A cell that fails is told and left, the others go on; with `resume` it is
    tried again. Raises SteersmanError where a cell failed, after the pages are written.
    """
    started, console = time.monotonic(), new_console()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SteersmanError(
            "grue starts the ranks of each cell itself, as many as run.devices says; start it without a launcher"
        )
    tasks, rows, every = check_matrix(recipe)
    with RunFolder(Path(recipe.run.dir), recipe, resume=resume) as folder, StopRequest() as signal:
        for task in tasks:
            write_rows(data_folder(recipe, task), task, rows[task.name])
            console.print(f"{task.name}: {rows[task.name].note}", style="dim")
        short = room(recipe, len(every))
        if short:
            console.print(short, style="yellow")
        clock, failed, stopped = Clock(every), {}, False
        for cell in every:
            if cell.done:
                continue
            blocked = _blocked(cell, recipe, failed)
            if blocked:
                failed[cell.name] = blocked
                continue
            console.print(clock.line(cell))
            try:
                stopped = not fill(cell, recipe) or bool(signal)
            except SteersmanError as error:
                failed[cell.name] = str(error)
                console.print(printable(f"cell {cell.name} failed: {error}"), style="red", soft_wrap=True)
            if stopped:
                break
            clock.done(cell)
        results = collect(recipe, tasks, every, failed)
        summary: dict[str, Any] = {
            "verb": "grue", "finished": not stopped and not failed, "cells": len(results.cells),
            "planned": len(every), "failed": failed, "seconds": round(time.monotonic() - started, 1),
            "run": str(folder.path),
        }  # fmt: skip
        if results.cells:
            summary |= write_pages(results, folder.path)
        write_atomic(folder.path / "summary.json", json.dumps(summary, indent=1))
    _tell(summary)
    if failed and not stopped:
        first = next(iter(failed.items()))
        raise SteersmanError(
            f"{len(failed)} of {len(every)} cells failed, such as {first[0]}: {first[1]}. The pages in {folder.path} "
            "show the others; --resume tries the failed ones again"
        )
    return summary


def fill(cell: Cell, recipe: GrueRecipe) -> bool:
    """Trains the cell by its verb and judges it; False where a signal stopped it, which a later call goes on from."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    write_atomic(cell.folder / "cell.json", json.dumps(cell.stamp, indent=1))
    if cell.recipe is not None and not _trained(cell):
        summary = _train(cell, recipe)
        if not summary["finished"]:
            return False
    result = judge(cell, recipe)
    if not recipe.run.keep_checkpoints:
        shutil.rmtree(cell.folder / "checkpoints", ignore_errors=True)
    spent = json.dumps({**result, "cell_seconds": round(time.monotonic() - began, 2)}, indent=1)
    write_atomic(cell.result, spent)
    return True


def _train(cell: Cell, recipe: GrueRecipe) -> dict[str, Any]:
    """The summary of the cell's verb, which runs in this process, or on as many ranks as the recipe asks for."""
    assert cell.verb is not None
    assert cell.recipe is not None
    if recipe.run.devices > 1:
        launch: Any = importlib.import_module("steersman.distributed.launch")  # torch's launcher loads slowly
        with _output(cell, recipe), _descriptors(sys.stdout):
            return launch.start(cell.verb, cell.recipe, recipe.run.devices, resume=True)
    name = {"sft": "steersman.verbs.sft"}.get(cell.verb, "steersman.verbs.rl")
    with _output(cell, recipe):
        return importlib.import_module(name).run(cell.recipe, resume=True)


class Clock:
    """How far the matrix is, and how long the rest will take, judged by the cells of the same method."""

    def __init__(self, every: list[Cell]) -> None:
        self.every, self.spent = every, {}
        for cell in every:
            if cell.done:
                self.done(cell)

    def done(self, cell: Cell) -> None:
        if cell.done:
            seconds = json.loads(cell.result.read_text(encoding="utf-8")).get("cell_seconds")
            if seconds is not None:
                self.spent.setdefault(cell.method, []).append(seconds)

    def left(self) -> float | None:
        """Seconds for the cells that are not done; None while nothing is known."""
        known = [s for listed in self.spent.values() for s in listed]
        if not known:
            return None
        means = {method: statistics.fmean(listed) for method, listed in self.spent.items()}
        return sum(means.get(c.method, max(means.values())) for c in self.every if not c.done)

    def line(self, cell: Cell) -> str:
        number, left = sum(c.done for c in self.every) + 1, self.left()
        rest = (
            "" if left is None else f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"
        )
        return f"cell {number} of {len(self.every)}: {cell.name}{rest}"


def _trained(cell: Cell) -> bool:
    path = cell.folder / "summary.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("finished", False)


def _blocked(cell: Cell, recipe: GrueRecipe, failed: dict[str, str]) -> str | None:
    """Why a cell can not begin: what it starts from, or is measured by, did not come to be."""
    needs = []
    if cell.method.startswith(f"{SUPERVISED}+"):
        needs.append(str(cell_folder(recipe, cell.task, SUPERVISED, cell.seed) / "model"))
    if cell.method != SUPERVISED and recipe.model.scratch is not None:
        needs.append(start_model(recipe, cell.task, cell.seed))
    lacking = [path for path in needs if not Path(path).exists()]
    return f"there is no {lacking[0]}: the supervised cell failed" if lacking else None


@contextlib.contextmanager
def _output(cell: Cell, recipe: GrueRecipe):
    """The verb's own pages and progress, into a file of the cell unless they are wanted on the screen."""
    if recipe.run.show_cells:
        yield
        return
    said = cell.folder / "output.txt"
    with open(said, "a", encoding="utf-8", opener=unlinked) as file, contextlib.redirect_stdout(file):
        yield


@contextlib.contextmanager
def _descriptors(file: Any):
    """What processes that are started meanwhile print goes into the file too."""
    kept = os.dup(1)
    try:
        os.dup2(file.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _tell(summary: dict[str, Any]) -> None:
    console = new_console()
    state = "done" if summary["finished"] else "stopped; go on with --resume"
    console.print(f"{summary['cells']} of {summary['planned']} cells; {state}")
    for name in ("table", "goodhart", "page", "leaderboard"):
        if name in summary:
            console.print(f"{name:<12}{summary[name]}", soft_wrap=True)
