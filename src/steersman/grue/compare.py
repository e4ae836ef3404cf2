"""Differences in reward between methods: over seeds, and over prompts."""

from __future__ import annotations

from typing import Any

from steersman.grue.results import Results
from steersman.grue.statistics import Mean
from steersman.grue.task import Task

OVERVIEW = (
    "Differences in reward. `↑` and `↓` stand where the interval over seeds leaves 0 out, `~` where it does not."
)
ARROWS = {"higher": "↑", "lower": "↓", "not told apart": "~", "one seed": ""}


def comparison_sentences(results: Results, task: Task) -> list[str]:
    """One sentence per comparison of rewards."""
    words = {
        "higher": "higher",
        "lower": "lower",
        "not told apart": "not told apart",
        "one seed": "one seed, no interval",
    }
    out = []
    for a, b, change in results.comparisons(task):
        prompts = results.over_prompts(task, a, b)
        second = "" if prompts is None or prompts.half is None else f" [± {prompts.half:.2g}, {words[prompts.sign]}]"
        out.append(f"{a} against {b}: {mean_text(change, signed=True)} ({words[change.sign]}){second}")
    return out


def overview(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the differences in reward, one row per task."""
    found = {
        task.name: {f"{a} − {b}": change for a, b, change in results.comparisons(task)} for task in results.tasks
    }
    names = list(dict.fromkeys(name for changes in found.values() for name in changes))
    rows = [[task, *(change_text(changes.get(n)) for n in names)] for task, changes in found.items() if changes]
    return ["task", *names], rows


def comparisons(results: Results) -> list[dict[str, Any]]:
    """Every difference in reward, with half the width of its interval over seeds and of the one over prompts."""
    out = []
    for task in results.tasks:
        for a, b, change in results.comparisons(task):
            prompts = results.over_prompts(task, a, b)
            out.append({
                "task": task.name, "ours": a, "theirs": b, "difference": change.value, "seeds": change.count,
                "half_over_seeds": change.half, "half_over_prompts": prompts.half if prompts is not None else None,
            })  # fmt: skip
    return out


def comparisons_with_intervals(results: Results) -> int:
    found = [c for task in results.tasks for c in results.comparisons(task)]
    return sum(change.half is not None for _, _, change in found)


def mean_text(value: Mean | None, *, signed: bool = False) -> str:
    """Three figures, with half the interval's width where there is one."""
    if value is None:
        return "–"
    text = f"{value.value:{'+' if signed else ''}.3g}"
    return text if value.half is None else f"{text} ± {value.half:.2g}"


def change_text(change: Mean | None) -> str:
    return "–" if change is None else f"{mean_text(change, signed=True)} {ARROWS[change.sign]}".strip()
