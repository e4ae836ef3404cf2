"""The whole matrix is checked before its first cell runs."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Sequence
from pathlib import Path

from steersman.grue.cells import Cell, cells, check_stamp, reward_parts
from steersman.grue.evaluate import corpus_value, metric_inputs, metrics_of
from steersman.grue.recipe import GrueRecipe
from steersman.grue.rows import TaskRows, demonstrations, task_rows
from steersman.grue.task import TASKS, Task, load_task
from steersman.metrics import metric
from steersman.reward import RewardConfig, build_reward
from steersman.run.device import resolve_device
from steersman.run.run_config import RunConfig
from steersman.setup.models import policy_from
from steersman.types import Prompt, Sample, SteersmanError

TRIED = 4
"""Held-out rows on which every metric and reward is tried."""


def check_matrix(recipe: GrueRecipe) -> tuple[list[Task], dict[str, TaskRows], list[Cell]]:
    """Tasks, their rows and the cells; raises one SteersmanError with everything that will not work."""
    problems: list[str] = []
    tasks: list[Task] = []
    for name in recipe.tasks:
        _collect(problems, lambda name=name: tasks.append(load_task(name)))
    if recipe.data.source == "hub":
        tasks = [task.of_original() for task in tasks]
    names = [task.name for task in tasks]
    problems += [f"tasks: two tasks are named '{n}'" for n in dict.fromkeys(names) if names.count(n) > 1]
    for name in recipe.per_task:
        if name not in {*names, *TASKS} and not problems:
            near = difflib.get_close_matches(name, [*names, *TASKS], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"per_task: '{name}' is no task of this matrix or of the project{hint}")
    rows: dict[str, TaskRows] = {}
    for task in tasks:
        _collect(problems, lambda task=task: rows.update({task.name: task_rows(task, recipe)}))
    every: list[Cell] = []
    for task in tasks:
        _collect(problems, lambda task=task: every.extend(cells(recipe, [task])))
        if task.name in rows:
            _collect(problems, lambda task=task: _try_metrics(task, rows[task.name]))
    if not problems:
        _collect(problems, lambda: _try_rewards(recipe, tasks, rows))
        for cell in every:
            _collect(problems, lambda cell=cell: check_stamp(cell))
    if problems:
        listed = "".join(f"\n  - {p}" for p in problems)
        raise SteersmanError(problems[0] if len(problems) == 1 else f"{len(problems)} problems{listed}")
    return tasks, rows, cells(recipe, tasks)


def room(recipe: GrueRecipe, count: int) -> str | None:
    """A sentence where the disk may be too small for that many cells' models; None where it is not."""
    folder = Path(recipe.model.path)
    if not folder.is_dir():
        return None
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    place = Path(recipe.run.dir)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free > (count + 6) * size:
        return None
    return f"{count} cells keep a model of {size / 2**20:.0f} MiB each, and {free / 2**20:.0f} MiB are free"


def _try_metrics(task: Task, rows: TaskRows) -> None:
    """Every metric can be made, and every row of both sides has what it needs."""
    for name, (made, spec) in metrics_of(task).items():
        try:
            metric_inputs(made, spec, rows.held_out)
            if made.needs:
                some = rows.held_out[:TRIED]
                corpus_value(made, spec, [(r["references"] or [r["prompt"]])[0] for r in some], some)
        except SteersmanError as error:
            raise SteersmanError(f"task {task.name}, metric {name}: {error}") from error


def _try_rewards(recipe: GrueRecipe, tasks: Sequence[Task], rows: dict[str, TaskRows]) -> None:
    """Every reward scores a few answers; training and held-out rows have what a metric needs."""
    run = RunConfig(device=recipe.run.device)
    device = resolve_device(recipe.run.device)
    policy = policy_from(recipe.model, run, device, trainable=recipe.model.scratch is not None)
    demands = any(c != "zero-shot" for c in recipe.methods)
    for task in tasks:
        table = rows[task.name]
        for side, listed in (("training", table.train), ("held-out", table.held_out)):
            if any(m.startswith("supervised") for m in recipe.methods) and not demonstrations(task, listed):
                raise SteersmanError(
                    f"task {task.name}: supervised cells need references to learn from, and none of the "
                    f"{len(listed)} {side} rows has one"
                )
        try:
            parts = RewardConfig.model_validate({"parts": reward_parts(recipe, task)})
            for part in parts.parts.values():
                if part.metric is not None and demands:
                    made = metric(part.metric, part.args)
                    metric_inputs(made, {"columns": part.columns}, [*table.train, *table.held_out])
            build_reward(parts, policy.tokenizer, device).score([_reference(r) for r in table.held_out[:TRIED]])
        except SteersmanError as error:
            raise SteersmanError(f"task {task.name}, reward: {error}") from error
        except ValueError as error:
            raise SteersmanError(f"task {task.name}, reward: {error}") from None


def _reference(row: dict) -> Sample:
    text = (row["references"] or [row["prompt"]])[0]
    return Sample(Prompt([0], row["prompt"], row), [0], [0.0], "eos", text)


def _collect(problems: list[str], step) -> None:
    try:
        step()
    except SteersmanError as error:
        problems.append(str(error))
