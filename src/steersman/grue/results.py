"""What the done cells say together: means over seeds, differences, and curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steersman.grue.cells import Cell, cell_folder, reward_parts
from steersman.grue.evaluate import metrics_of, read_answers
from steersman.grue.recipe import SUPERVISED, ZERO, GrueRecipe
from steersman.grue.statistics import Mean, difference, mean
from steersman.grue.task import Task
from steersman.jsonl import read_jsonl
from steersman.run.report.charts import Line

Group = Literal["reward", "preference", "natural"]
NATURAL: dict[str, str] = {
    "perplexity": "lower", "distinct1": "higher", "distinct2": "higher", "entropy2": "higher", "msttr": "higher",
    "repetition": "lower", "length": "neither", "empty": "lower",
}  # fmt: skip
"""What text is like, and which way is the better one."""


@dataclass(frozen=True, slots=True)
class Move:
    """What a method did to one metric, against what it started from.

    `significant`: the change is more than noise. Over several seeds that is an interval without 0; of one seed, more
    than twice the half width of the wider bootstrap interval over the prompts, which knows nothing of what another
    seed would give.
    """

    metric: str
    better: str
    change: Mean
    significant: bool

    @property
    def harm(self) -> bool:
        """Whether it is seen to have gone against its own direction."""
        return self.significant and self.better != "neither" and (self.change.value < 0) == (self.better == "higher")


@dataclass(slots=True)
class Results:
    """All evaluations of a matrix; `failed` are the cells that did not finish, with their reasons."""

    recipe: GrueRecipe
    tasks: list[Task]
    cells: dict[tuple[str, str, int], dict[str, Any]]
    planned: int
    failed: dict[str, str]

    def methods(self, task: Task) -> list[str]:
        order = dict.fromkeys([ZERO, SUPERVISED, *self.recipe.methods])
        return [m for m in order if any((task.name, m, s) in self.cells for s in self.recipe.seeds)]

    def by_seed(self, task: Task, method: str, group: Group, name: str) -> dict[int, float]:
        out = {}
        for seed in self.recipe.seeds:
            value = self.cells.get((task.name, method, seed), {}).get(group, {}).get(name)
            value = value[0] if isinstance(value, list) else value
            if value is not None:
                out[seed] = value
        return out

    def mean(self, task: Task, method: str, group: Group, name: str) -> Mean | None:
        return mean(list(self.by_seed(task, method, group, name).values()))

    def change(self, task: Task, ours: str, theirs: str, group: Group, name: str) -> Mean | None:
        return difference(self.by_seed(task, ours, group, name), self.by_seed(task, theirs, group, name))

    def over_prompts(self, task: Task, ours: str, theirs: str) -> Mean | None:
        """The difference of the reward with Student's interval over the held-out prompts, paired by prompt.

        Each prompt's difference is its mean over the seeds that both methods have, so the interval says how sure the
        difference of these trained models is on other prompts, and nothing about other seeds.
        """
        both = [s for s in self.by_seed(task, ours, "reward", "total") if (task.name, theirs, s) in self.cells]
        answers = [[self._rewards(task, m, s) for m in (ours, theirs)] for s in both]
        if not all(len(a) == len(b) > 0 for a, b in answers):
            return None
        pairs = [[x - y for x, y in zip(a, b, strict=True)] for a, b in answers]
        return mean([sum(prompt) / len(pairs) for prompt in zip(*pairs, strict=True)])

    def _rewards(self, task: Task, method: str, seed: int) -> list[float]:
        folder = cell_folder(self.recipe, task, method, seed)
        return [row["reward"] for row in read_answers(folder)]

    def columns(self, task: Task) -> list[tuple[Group, str]]:
        """The reward, the task's metrics, then what the text is like."""
        return [("reward", "total"), *(("preference", n) for n in task.metrics), *(("natural", n) for n in NATURAL)]

    def rewarded(self, task: Task) -> set[str]:
        """The metrics that are (part of) the reward."""
        parts = [(p.get("metric"), p.get("args", {})) for p in reward_parts(self.recipe, task).values()]
        return {n for n, spec in task.metrics.items() if (spec["metric"], spec.get("args", {})) in parts}

    def moves(self, task: Task, method: str) -> list[Move]:
        """What the method did to every metric that was not its reward."""
        start, out = started_from(method), []
        directions = {n: m.better for n, (m, _) in metrics_of(task).items() if n not in self.rewarded(task)}
        sides: list[tuple[Group, dict[str, str]]] = [("preference", directions), ("natural", NATURAL)]
        for group, named in sides:
            for name, better in named.items():
                change = self.change(task, method, start, group, name)
                if change is not None:
                    seen = change.sign in ("higher", "lower")
                    if change.half is None:
                        seen = self._apart(task, method, start, group, name)
                    out.append(Move(name, better, change, seen))
        return out

    def _apart(self, task: Task, ours: str, theirs: str, group: Group, name: str) -> bool:
        """Whether the one seed's change is above twice the wider of the two bootstrap intervals' half widths.

        The wider one, because a set where nothing was hit has an interval of no width and yet is no certainty.
        """
        for seed in self.by_seed(task, ours, group, name):
            pair = [self.cells.get((task.name, m, seed), {}).get(group, {}).get(name) for m in (ours, theirs)]
            if all(isinstance(v, list) and None not in v for v in pair):
                half = max((high - low) / 2 for _, low, high in pair)
                return abs(pair[0][0] - pair[1][0]) > 2 * half
        return False

    def comparisons(self, task: Task) -> list[tuple[str, str, Mean]]:
        """Differences of the reward: each method to what it started from, and NLPO to PPO from the same start."""
        have = self.methods(task)
        pairs = [(m, started_from(m)) for m in have if m != ZERO]
        pairs += [(m, m.replace("nlpo", "ppo")) for m in have if "nlpo" in m]
        found = [(a, b, self.change(task, a, b, "reward", "total")) for a, b in pairs if b in have]
        return [(a, b, change) for a, b, change in found if change is not None]

    def curves(self, task: Task, name: str) -> list[Line]:
        """A held-out number of the training logs, one line per method, the mean over the seeds that logged it."""
        out = []
        for method in self.methods(task):
            steps: dict[float, list[float]] = {}
            for line in self.seed_curves(task, method, name):
                for step, value in zip(line.steps, line.values, strict=True):
                    steps.setdefault(step, []).append(value)
            if steps:
                at = sorted(steps)
                out.append(Line(method, at, [sum(steps[s]) / len(steps[s]) for s in at]))
        return out

    def seed_curves(self, task: Task, method: str, name: str) -> list[Line]:
        """The same of one on-policy method, one line per seed."""
        out = []
        for seed in self.recipe.seeds if method not in (ZERO, SUPERVISED) else []:
            rows = _log(cell_folder(self.recipe, task, method, seed))
            told = [(float(r["step"]), r.get(f"held_out/{name}")) for r in rows]
            points = [(step, float(value)) for step, value in told if isinstance(value, int | float)]
            if points:
                out.append(Line(f"{method} seed {seed}", [p[0] for p in points], [p[1] for p in points]))
        return out

    def watched(self, task: Task) -> list[str]:
        """The names of the numbers that have curves, the reward first."""
        names = dict.fromkeys(["reward/total"])
        for method in self.methods(task):
            for seed in self.recipe.seeds:
                for row in _log(cell_folder(self.recipe, task, method, seed)):
                    names |= dict.fromkeys(k.removeprefix("held_out/") for k in row if k.startswith("held_out/"))
        only = [n for n in names if n.startswith("reward/") and n != "reward/total"]
        if len(reward_parts(self.recipe, task)) == 1:  # the one part is the total, up to its weight
            only = [n for n in only if n.removeprefix("reward/") not in reward_parts(self.recipe, task)]
        rest = [n for n in ("perplexity", "distinct2", "length", "kl") if n in names]
        return ["reward/total", *only, *rest]


def started_from(method: str) -> str:
    """The method whose model another one begins with."""
    return SUPERVISED if method.startswith(f"{SUPERVISED}+") else ZERO


def collect(recipe: GrueRecipe, tasks: Sequence[Task], every: Sequence[Cell], failed: dict[str, str]) -> Results:
    """The results of the cells that are done."""
    found = {}
    for cell in every:
        if cell.done:
            found[cell.task.name, cell.method, cell.seed] = json.loads(cell.result.read_text(encoding="utf-8"))
    return Results(recipe, list(tasks), found, len(every), failed)


def _log(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "metrics.jsonl")
