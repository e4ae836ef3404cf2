"""One picture of a matrix: learning curves of the reward, and how far every other metric moved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from steersman.grue.recipe import SUPERVISED, ZERO
from steersman.grue.results import Results, started_from
from steersman.grue.task import Task

COLOURS = ["#2b5f8f", "#c8642b", "#2f8a62", "#9d4a92", "#a58310", "#4b8fb5", "#b3505a", "#6d7480"]
ABREAST = 4
"""Tasks side by side; more would be too small to read on a page."""
FURTHEST = 100.0
"""Per cent beyond which a move is drawn at the edge, as an arrow."""


def draw(results: Results, path: Path) -> None:
    """Writes a PNG with two panels per task, four tasks abreast; nothing where no cell is done."""
    tasks = [task for task in results.tasks if results.methods(task)]
    if not tasks:
        return
    trained = list(dict.fromkeys(m for t in tasks for m in results.methods(t) if m not in (ZERO, SUPERVISED)))
    colours = {m: COLOURS[i % len(COLOURS)] for i, m in enumerate(trained)}
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        blocks, wide = math.ceil(len(tasks) / ABREAST), min(len(tasks), ABREAST)
        figure = Figure(figsize=(3.1 * wide + 1, 6.6 * blocks), layout="constrained")
        panels: Any = figure.subplots(2 * blocks, wide, squeeze=False, height_ratios=[1, 1.25] * blocks)
        for place in range(blocks * wide):
            upper, lower = (panels[2 * (place // wide) + i, place % wide] for i in (0, 1))
            if place < len(tasks):
                _curves(upper, results, tasks[place], colours)
                _moves(lower, results, tasks[place], colours)
            else:
                upper.set_axis_off()
                lower.set_axis_off()
            if place % wide == 0:
                upper.set_ylabel("reward on held-out prompts")
        handles = [Line2D([], [], color=c, marker="o", ms=4, label=m) for m, c in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6) or 1, frameon=False)
        figure.savefig(path, dpi=130)


def _curves(axes: Any, results: Results, task: Task, colours: dict[str, str]) -> None:
    """The mean over seeds, and each seed thinly behind it."""
    for line in results.curves(task, "reward/total"):
        for seed in results.seed_curves(task, line.name, "reward/total") if len(results.recipe.seeds) > 1 else []:
            axes.plot(seed.steps, seed.values, color=colours[line.name], lw=0.6, alpha=0.4)
        axes.plot(line.steps, line.values, color=colours[line.name], marker="o", ms=2.5, lw=1.3)
    axes.set_title(task.name, fontweight="bold")
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", lw=0.4)


def _moves(axes: Any, results: Results, task: Task, colours: dict[str, str]) -> None:
    """Change of each metric that was not rewarded, in per cent of what the method started from."""
    names: list[str] = []
    shift = 0.8 / max(len(colours), 1)
    for order, (method, colour) in enumerate(colours.items()):
        for move in results.moves(task, method) if method in results.methods(task) else []:
            group = "preference" if move.metric in task.metrics else "natural"
            before = results.mean(task, started_from(method), group, move.metric)
            if before is None or before.value == 0:
                continue
            if move.metric not in names:
                names.append(move.metric)
            percent = 100 * move.change.value / abs(before.value)
            at = names.index(move.metric) + (order + 0.5) * shift - 0.4
            marker = "o" if abs(percent) <= FURTHEST else ">" if percent > 0 else "<"
            axes.plot([max(-FURTHEST, min(FURTHEST, percent))], [at], marker, ms=4, color=colour, clip_on=False,
                      mfc=colour if move.significant else "none")  # fmt: skip
            if move.change.half is not None:
                half = 100 * move.change.half / abs(before.value)
                low, high = (max(-FURTHEST, min(FURTHEST, percent + s * half)) for s in (-1, 1))
                if math.isfinite(half):
                    axes.plot([low, high], [at, at], lw=1, color=colour)
    axes.axvline(0, color="#6d7480", lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(-1.05 * FURTHEST, 1.05 * FURTHEST)
    axes.set_xlabel("change in metrics not rewarded, %\n(filled: more than noise; arrow: further out)")
    axes.grid(axis="x", lw=0.4)
