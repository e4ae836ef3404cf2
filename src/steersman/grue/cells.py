"""The cells of a matrix, each with the recipe of the verb that fills it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from steersman.algorithms import ALGORITHMS
from steersman.config.dump import flat_keys
from steersman.config.load import with_new_defaults
from steersman.config.sections import Section
from steersman.grue.recipe import SUPERVISED, ZERO, Generation, GrueRecipe
from steersman.grue.task import Task
from steersman.types import SteersmanError
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.sft import SFTRecipe

SLOW = {"bertscore", "classifier", "perplexity", "spice", "meteor1.5", "cider", "parent"}
"""Metrics that are too slow, or not defined on single texts, to be looked at in every iteration."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the matrix; `verb` is None for zero-shot, which trains nothing."""

    task: Task
    method: str
    seed: int
    folder: Path
    verb: str | None
    recipe: Section | None
    judged: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.task.name} {self.method} seed {self.seed}"

    @property
    def result(self) -> Path:
        return self.folder / "evaluation.json"

    @property
    def done(self) -> bool:
        return self.result.exists()

    @property
    def stamp(self) -> dict[str, Any]:
        """What made the cell; a cell made otherwise can not stand beside it. A matrix may be moved as a whole."""
        root = json.dumps(str(self.folder.parents[3]))[1:-1]
        dumped = self.recipe.model_dump(mode="json") if self.recipe is not None else None
        recipe = json.loads(json.dumps(dumped).replace(f'"{root}/', '"MATRIX/'))
        who = {"task": self.task.name, "method": self.method, "seed": self.seed, "verb": self.verb}
        return who | {"judged": self.judged, "recipe": recipe}


def cells(recipe: GrueRecipe, tasks: list[Task]) -> list[Cell]:
    """All cells in the order in which they run: seed by seed, so that a part of the matrix is a whole one of fewer
    seeds, and what others start from first.

    A supervised cell that is not asked for is made where `supervised+...` starts from it.
    """
    methods = list(recipe.methods)
    if SUPERVISED not in methods and any(m.startswith(f"{SUPERVISED}+") for m in methods):
        methods.append(SUPERVISED)
    methods.sort(key=lambda m: (m != ZERO, m != SUPERVISED))
    return [cell(recipe, task, method, seed) for seed in recipe.seeds for task in tasks for method in methods]


def cell(recipe: GrueRecipe, task: Task, method: str, seed: int) -> Cell:
    """One cell with its verb's recipe; raises SteersmanError naming the cell where the recipe does not fit."""
    folder, evaluation = cell_folder(recipe, task, method, seed), recipe.evaluation
    judged = {
        "greedy": evaluation.greedy, "msttr_segment": evaluation.msttr_segment,
        "generation": generation(recipe, task),
        "reward": reward_parts(recipe, task), "metrics": {k: dict(v) for k, v in task.metrics.items()},
        "start": recipe.model.path,
    }  # fmt: skip
    try:
        if method == ZERO:
            return Cell(task, method, seed, folder, None, None, judged)
        if method == SUPERVISED:
            return Cell(task, method, seed, folder, "sft", supervised(recipe, task, seed), judged)
        verb = method.removeprefix(f"{SUPERVISED}+")
        start = recipe.model.path
        if verb != method:
            start = str(cell_folder(recipe, task, SUPERVISED, seed) / "model")
        return Cell(task, method, seed, folder, verb, on_policy(recipe, task, verb, start, folder, seed), judged)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors())
        raise SteersmanError(f"cell {task.name} {method}: {told}") from None


def cell_folder(recipe: GrueRecipe, task: Task, method: str, seed: int) -> Path:
    return Path(recipe.run.dir) / "cells" / task.name / method / f"seed-{seed}"


def data_folder(recipe: GrueRecipe, task: Task) -> Path:
    return Path(recipe.run.dir) / "data" / task.name


def supervised(recipe: GrueRecipe, task: Task, seed: int) -> SFTRecipe:
    """`steersman sft` on the task's references."""
    data = data_folder(recipe, task)
    return SFTRecipe.model_validate(
        {
            "model": recipe.model.model_dump() | {"merge": True},
            "data": {
                "path": str(data / "demonstrations.jsonl"),
                "held_out_files": [str(data / "held-out-demonstrations.jsonl")],
                "completion_prefix": task.answer_prefix,
                "wrap_in_chat": False,
                "on_too_long": "truncate",
            },
            "train": recipe.supervised.train.model_dump(),
            "optimizer": recipe.supervised.optimizer.model_dump(),
            "run": _run(recipe, task, SUPERVISED, seed),
            "parallel": recipe.parallel.model_dump(),
        }
    )


def on_policy(recipe: GrueRecipe, task: Task, verb: str, start: str, folder: Path, seed: int) -> Section:
    """The verb toward the task's reward, from the start model or the supervised one."""
    rl, data = recipe.rl, data_folder(recipe, task)
    values: dict[str, Any] = {
        "model": recipe.model.model_dump() | {"path": start, "scratch": None, "merge": True},
        "data": {
            "path": str(data / "prompts.jsonl"),
            "wrap_in_chat": False,
            "held_out_files": [str(data / "held-out.jsonl")],
            "on_too_long": "truncate",
        },
        "reward": {"parts": reward_parts(recipe, task) | watched_metrics(recipe, task), "normalise": rl.normalise},
        "rollout": {
            **generation(recipe, task), "prompts": rl.prompts, "samples": rl.samples, "held_out": rl.looks,
        },
        "algorithm": recipe.algorithms.get(verb, {}),
        "optimizer": rl.optimizer.model_dump(),
        "iterations": rl.iterations,
        "run": _run(recipe, task, folder.parent.name, seed),
        "parallel": recipe.parallel.model_dump(),
    }  # fmt: skip
    if ALGORITHMS[verb].critic:
        values["critic"] = {"optimizer": rl.critic.model_dump()}
    return RECIPES[verb].model_validate(values)


def reward_parts(recipe: GrueRecipe, task: Task) -> dict[str, dict[str, Any]]:
    """What is rewarded: the recipe's word, or else the task's; a metric of an empty response is 0."""
    own = recipe.per_task.get(task.name)
    if own is not None and own.reward is not None:
        return {name: part.model_dump(exclude_defaults=True) for name, part in own.reward.items()}
    return {name: _scoring(part) for name, part in task.rewards.items()}


def watched_metrics(recipe: GrueRecipe, task: Task) -> dict[str, dict[str, Any]]:
    """The task's other metrics as parts of weight 0: they draw learning curves and teach nothing."""
    if not recipe.rl.watch:
        return {}
    rewards = reward_parts(recipe, task)
    same = [(p.get("metric"), p.get("args", {})) for p in rewards.values()]
    return {
        name: _scoring({**spec, "weight": 0.0})
        for name, spec in task.metrics.items()
        if name not in rewards and spec["metric"] not in SLOW and (spec["metric"], spec.get("args", {})) not in same
    }


def generation(recipe: GrueRecipe, task: Task) -> dict[str, Any]:
    """The task's settings of sampling, the recipe's over them, the task's own section of the recipe over those."""
    own = recipe.per_task.get(task.name)
    layers = [recipe.generation, own.generation if own else Generation()]
    given = [{k: v for k, v in layer.model_dump().items() if v is not None} for layer in layers]
    return dict(task.generation) | given[0] | given[1]


def start_model(recipe: GrueRecipe, task: Task, seed: int) -> str:
    """The model under which perplexity is measured: what training starts from, or the supervised one where that has
    fresh weights."""
    if recipe.model.scratch is None:
        return recipe.model.path
    return str(cell_folder(recipe, task, SUPERVISED, seed) / "model")


def check_stamp(cell: Cell) -> None:
    """Raises SteersmanError where the cell's folder holds a cell that was made with other settings: with another
    value, with one that the recipe has no more, or without one that it has now."""
    path = cell.folder / "cell.json"
    if not path.exists():
        return
    stamp = json.loads(path.read_text(encoding="utf-8"))
    recipe = stamp["recipe"]
    if recipe is not None and cell.recipe is not None:
        recipe = with_new_defaults(type(cell.recipe), recipe)
    before, now = flat_keys(stamp | {"recipe": recipe}), flat_keys(json.loads(json.dumps(cell.stamp)))
    for key in dict.fromkeys([*now, *before]):
        was, asked = before.get(key), now.get(key)
        if was != asked and not key.startswith(_FREE):
            made = f"without {key}" if was is None else f"with {key} {was!r}"
            told = "has none" if asked is None else f"asks for {asked!r}"
            raise SteersmanError(
                f"cell {cell.name}: {cell.folder} was made {made}, and the recipe now {told}; take it back, choose "
                "another --run.dir, or delete that folder"
            )


_FREE = (
    "recipe.run.dir", "recipe.run.threads", "recipe.run.device", "recipe.run.save_every", "recipe.run.save_async",
    "recipe.parallel", "recipe.model.max_shard_size",
)  # fmt: skip
"""What may change between the cells of one matrix without changing what they measure."""


def _scoring(part: Mapping[str, Any]) -> dict[str, Any]:
    return {"empty": 0.0, **part} if "metric" in part else dict(part)


def _run(recipe: GrueRecipe, task: Task, method: str, seed: int) -> dict[str, Any]:
    run, looks = recipe.run, recipe.run.eval_every
    if method == SUPERVISED:  # its steps are many and short, those of the on-policy methods few and long
        looks = recipe.supervised.eval_every or looks
    return {
        "dir": str(cell_folder(recipe, task, method, seed)), "seed": seed, "device": run.device,
        "threads": run.threads, "micro_tokens": run.micro_tokens, "eval_every": looks,
        "devices": run.devices,
        "save_every": run.save_every, "keep_last": 1, "keep_best": int(method == SUPERVISED),
    }  # fmt: skip
