"""The page and the picture of the chat-model study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from recording import over_seeds, plain_axes, rewrite
from tasks import TASKS

MEASURES = {
    "sums": ("pass@1", "pass@4", "words", "distinct_2"),
    "rules": ("pass@1", "pass@4", "words", "distinct_2"),
    "gsm8k": ("pass@1", "pass@4", "words", "distinct_2"),
    "polite": ("judge", "rouge_l", "words", "distinct_2"),
}
COSTS = ("processor_seconds", "peak_mib")
COLOURS = {"steersman": "#1f5f8b", "trl": "#c2571a"}


def read(out: Path, task: str, side: str, method: str) -> list[dict[str, Any]]:
    """The finished cells, by seed."""
    return [_read(file) for file in sorted((out / task / side).glob(f"{method}-*/cell.json"))]


def _read(file: Path) -> dict[str, Any]:
    """A cell without the answers to one of IFEval's prompts, which are not fit to print."""
    cell = json.loads(file.read_text())
    return cell | {"examples": [pair for pair in cell["examples"] if "adult website" not in pair[0]]}


def score(cells: Sequence[dict[str, Any]], name: str) -> str:
    """Mean over seeds, and half its 95% interval over held-out prompts where a score has one.

    The prompts are the same for every seed, so more seeds do not make the interval narrower.
    """
    mean = over_seeds([cell[name] for cell in cells])["mean"]
    errors = [cell[f"{name} error"] for cell in cells if f"{name} error" in cell]
    half = f" ± {1.96 * over_seeds(errors)['mean']:.3f}" if errors else ""
    return f"{mean:.3f}{half}"


def cost(values: Sequence[float]) -> str:
    """Mean and, of several seeds, standard deviation."""
    got = over_seeds(list(values))
    return f"{got['mean']:.0f}" + (f" ± {got['sd']:.0f}" if len(values) > 1 else "")


def table(out: Path, task: str) -> list[str]:
    """The start, then each method by each side: held-out scores and what the training cost."""
    names = MEASURES[task]
    start = _read(out / task / "start.json")
    lines = [
        f"| | seeds | {' | '.join(names)} | processor seconds | peak MiB |",
        f"| --- |{' ---: |' * (len(names) + 3)}",
        f"| before | | {' | '.join(score([start], name) for name in names)} | | |",
    ]
    for method in TASKS[task]["methods"]:
        for side in COLOURS:
            cells = read(out, task, side, method)
            if cells:
                scores = [score(cells, name) for name in names]
                costs = [cost([cell[name] for cell in cells]) for name in COSTS]
                lines.append(f"| {method}, {side} | {len(cells)} | {' | '.join([*scores, *costs])} |")
    return lines


def examples(out: Path, task: str) -> list[str]:
    """What the model said to the same questions before and after, from the first seed."""
    before = _read(out / task / "start.json")["examples"]
    lines = []
    for method in TASKS[task]["methods"]:
        cells = read(out, task, "steersman", method)
        if not cells:
            continue
        for (prompt, old), (_, new) in list(zip(before, cells[0]["examples"], strict=True))[:3]:
            lines += [
                f"    asked           {prompt!r}",
                f"    before          {old!r}",
                f"    after {method:9} {new!r}",
                "",
            ]
    return lines


def draw(out: Path, file: Path) -> None:
    """Each method's curve on its own samples, by side: reward for GRPO, loss for the others."""
    panels = [(task, method) for task in TASKS for method in TASKS[task]["methods"]]
    figure, axes = plt.subplots(2, 4, figsize=(14, 5.6), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (task, method) in zip(axes.flat, panels, strict=False):
        for side, colour in COLOURS.items():
            for n, cell in enumerate(read(out, task, side, method)):
                axis.plot(cell["curve"], color=colour, lw=0.9, alpha=0.7, label=side if n == 0 else None)
        plain_axes(axis, f"{task}: {method}, {'reward on its own samples' if method == 'grpo' else 'loss'}")
        axis.set_xlabel("iteration" if method == "grpo" else "step", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_page(out: Path, docs: Path) -> None:
    """Replaces the tables and examples of `chat.md`, draws `chat.png` and keeps the cells in `chat.json`."""
    tasks = [task for task in TASKS if (out / task / "start.json").exists()]
    lines: list[str] = []
    kept: dict[str, Any] = {}
    for task in tasks:
        lines += [f"### {task}", "", *table(out, task), "", *examples(out, task)]
        kept[task] = {"start": _read(out / task / "start.json")} | {
            f"{method}, {side}": read(out, task, side, method)
            for method in TASKS[task]["methods"]
            for side in COLOURS
        }
    rewrite(docs / "chat.md", "\n".join(lines).rstrip() + "\n")
    (docs / "chat.json").write_text(json.dumps(kept, indent=1) + "\n")
    draw(out, docs / "chat.png")
