"""The pages of a matrix: the table, the curves, the sample sheets, and what became of the metrics nobody rewarded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from steersman.atomic import write_atomic
from steersman.grue import leaderboard
from steersman.grue.cells import cell_folder, reward_parts
from steersman.grue.compare import (
    OVERVIEW,
    change_text,
    comparison_sentences,
    comparisons,
    comparisons_with_intervals,
    mean_text,
    overview,
)
from steersman.grue.evaluate import metrics_of, read_answers
from steersman.grue.picture import draw
from steersman.grue.recipe import SUPERVISED, ZERO
from steersman.grue.results import Move, Results, started_from
from steersman.grue.statistics import Mean
from steersman.grue.task import Task
from steersman.run.report.charts import SERIES, line_chart

READING = (
    "Changes against what a method started from (the start model, or the supervised one), paired by seed. `↑` and "
    "`↓` stand where the interval over seeds leaves 0 out, `~` where it does not; `!` marks a move against the "
    "metric's own direction that is more than noise (of one seed: than twice the half width of the wider bootstrap "
    "interval over the prompts)."
)
TITLES = {
    "reward/total": "reward",
    "perplexity": "perplexity under the model it began with",
    "length": "length, tokens",
    "kl": "KL to the model it began with, nats",
}


def write_pages(results: Results, folder: Path) -> dict[str, str]:
    """Writes results.json, leaderboard.json, grue.md, goodhart.md, samples/TASK.md, grue.html and grue.png."""
    board = leaderboard.add(folder / "leaderboard.json", leaderboard.entries(results))
    others = [e for e in board if e["by"] != "steersman"]
    write_atomic(folder / "results.json", json.dumps(as_json(results), indent=1, ensure_ascii=False))
    write_atomic(folder / "grue.md", table_page(results, others))
    write_atomic(folder / "goodhart.md", goodhart_page(results))
    (folder / "samples").mkdir(exist_ok=True)
    for task in results.tasks:
        if results.methods(task):
            write_atomic(folder / "samples" / f"{task.name}.md", sample_sheet(results, task))
    write_atomic(folder / "grue.html", html_page(results, others))
    draw(results, folder / "grue.png")
    return {"table": str(folder / "grue.md"), "goodhart": str(folder / "goodhart.md"),
            "page": str(folder / "grue.html"), "leaderboard": str(folder / "leaderboard.json")}  # fmt: skip


def as_json(results: Results) -> dict[str, Any]:
    """Every cell's numbers, and how each metric is computed."""
    return {
        "recipe": results.recipe.model_dump(mode="json"),
        "done": len(results.cells), "planned": results.planned, "failed": results.failed,
        "comparisons": comparisons(results),
        "metrics": {t.name: {n: m.implementation for n, (m, _) in metrics_of(t).items()} for t in results.tasks},
        "cells": list(results.cells.values()),
    }  # fmt: skip


def head(results: Results) -> list[str]:
    """How much of the matrix the page shows, and how to read it."""
    recipe, done = results.recipe, len(results.cells)
    whole = (
        f"All {done} cells." if done == results.planned else f"Partial: {done} of {results.planned} cells are done."
    )
    seeds = len(recipe.seeds)
    spread = f"Means over {seeds} seeds with 95% Student intervals." if seeds > 1 else "One seed: no intervals."
    if seeds > 1 and done < results.planned:
        spread = (
            f"Means over as many of {seeds} seeds as the column says, with 95% Student intervals from two seeds on."
        )
    lines = [f"{whole} {spread} Model `{recipe.model_name}`, data: {recipe.data.source}."]
    lines += [f"Failed: {name}: {why}" for name, why in results.failed.items()]
    return lines


def table_page(results: Results, others: Sequence[dict[str, Any]]) -> str:
    """The table of the benchmark's paper (arXiv 2210.01241): preference metrics beside naturalness metrics."""
    out = ["# GRUE", "", *head(results), "", OVERVIEW, "", *markdown(*overview(results)), "",
           "`*` marks what was rewarded.", ""]  # fmt: skip
    for task in results.tasks:
        if not results.methods(task):
            continue
        out += [f"## {task.name}: {task.about}", "", *markdown(*table(results, task)), ""]
        missing = missing_values(results, task)
        out += [f"- {line}" for line in missing] + ([""] if missing else [])
        out += [
            "Reward, paired by seed, and in brackets the same models over the held-out prompts:",
            "",
            *(f"- {line}" for line in comparison_sentences(results, task)),
            "",
        ]
    out += [
        f"{n} comparisons at 95%: about one in twenty is a false alarm."
        for n in [comparisons_with_intervals(results)]
        if n
    ] + [""]
    if others:
        out += ["## Entries of others", "", *markdown(*other_entries(others)), ""]
    return "\n".join(out)


def table(results: Results, task: Task) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one task."""
    columns, rewarded = results.columns(task), results.rewarded(task)
    header = ["method", "seeds", *(n if g != "reward" else "reward*" for g, n in columns)]
    header = [f"{h}*" if h in rewarded else h for h in header]
    rows = []
    for method in results.methods(task):
        values = [results.mean(task, method, group, name) for group, name in columns]
        seeds = str(len(results.by_seed(task, method, "reward", "total")))
        rows.append([method, seeds, *(mean_text(v) for v in values)])
    return header, rows


def missing_values(results: Results, task: Task) -> list[str]:
    """Why a cell has no value for a metric."""
    return [
        f"{method} seed {seed}: no {metric}: {why}"
        for (name, method, seed), cell in results.cells.items()
        if name == task.name
        for metric, why in cell["missing"].items()
    ]


def goodhart_page(results: Results) -> str:
    """For each task, what happened to every metric that was not the reward."""
    out = ["# What became of the metrics that were not the reward", "", *head(results), "",
           READING, ""]  # fmt: skip
    for task in results.tasks:
        found = goodhart(results, task)
        if found is not None:
            header, rows, sentences = found
            out += [f"## {task.name}", "", *markdown(header, rows), "", *(f"- {s}" for s in sentences), ""]
    return "\n".join(out)


def goodhart(results: Results, task: Task) -> tuple[list[str], list[list[str]], list[str]] | None:
    """Header, rows and sentences of a task; None where no method was trained toward the reward."""
    methods = [
        m for m in results.methods(task) if m not in (ZERO, SUPERVISED) and started_from(m) in results.methods(task)
    ]
    if not methods:
        return None
    moves = {m: {move.metric: move for move in results.moves(task, m)} for m in methods}
    reward = {m: results.change(task, m, started_from(m), "reward", "total") for m in methods}
    named = ", ".join(reward_parts(results.recipe, task))
    rows = [[f"reward ({named})", "higher", *(change_text(reward[m]) for m in methods)]]
    names = dict.fromkeys(name for found in moves.values() for name in found)
    for name in names:
        better = next(found[name].better for found in moves.values() if name in found)
        rows.append([name, better, *(_move(moves[m].get(name)) for m in methods)])
    return ["metric", "better", *methods], rows, [_sentence(m, reward[m], moves[m]) for m in methods]


def sample_sheet(results: Results, task: Task) -> str:
    """The same held-out prompts, answered by every method, of the first seed that is done."""
    out = [
        f"# Samples: {task.name}",
        "",
        "The answers of the first seed, as they were sampled; chosen by the order of the file alone.",
        "",
    ]
    for prompt, references, said in sheets(results, task):
        out += ["```text", prompt, "```", "", *(f"- reference: {_line(r)}" for r in references[:2])]
        out += [f"- {method} (reward {reward:.3g}): {_line(text) or '(empty)'}" for method, text, reward in said] + [
            ""
        ]
    return "\n".join(out)


def sheets(results: Results, task: Task) -> list[tuple[str, list[str], list[tuple[str, str, float]]]]:
    """(prompt, references, [(method, answer, its reward)]) for the first few held-out prompts."""
    answers = {}
    for method in results.methods(task):
        seed = next(s for s in results.recipe.seeds if (task.name, method, s) in results.cells)
        answers[method] = read_answers(cell_folder(results.recipe, task, method, seed))
    first = next(iter(answers.values()), [])[: results.recipe.evaluation.sheets]
    return [
        (row["prompt"], row["references"], [(m, rows[i]["text"], rows[i]["reward"]) for m, rows in answers.items()])
        for i, row in enumerate(first)
    ]


def html_page(results: Results, others: Sequence[dict[str, Any]]) -> str:
    """All of it on one page, with the learning curves."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("steersman.grue"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    sections = []
    for task in results.tasks:
        if results.methods(task):
            sections.append({
                "task": task, "table": table(results, task), "compared": comparison_sentences(results, task),
                "missing": missing_values(results, task), "goodhart": goodhart(results, task),
                "charts": charts(results, task), "sheets": sheets(results, task),
            })  # fmt: skip
    return environment.get_template("grue.html.j2").render(
        head=[line.replace("`", "") for line in head(results)],
        overview_reading=OVERVIEW.replace("`", ""),
        overview=overview(results),
        reading=READING.replace("`", ""),
        looks=results.recipe.rl.looks,
        sections=sections,
        others=other_entries(others) if others else None,
    )


def charts(results: Results, task: Task) -> list[tuple[str, Markup, list[str]]]:
    """(title, picture, names of its lines) of the reward and of everything watched."""
    out = []
    for name in results.watched(task):
        lines = results.curves(task, name)[:SERIES]
        if lines:
            title = TITLES.get(name, name.removeprefix("reward/"))
            out.append((title, Markup(line_chart(f"{task.name} {title}", lines)), [line.name for line in lines]))
    return out


def other_entries(others: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the leaderboard entries that came from elsewhere."""
    header = ["task", "by", "model", "method", "data", "held out", "metrics"]
    rows = [
        [*(str(e[k]) for k in ("task", "by", "model", "method", "data", "held_out")),
         ", ".join(f"{n} {v['mean']:.3g}" for n, v in e["metrics"].items())]
        for e in others
    ]  # fmt: skip
    return header, rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown; a bar in a cell is escaped."""
    listed = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in listed]


def _move(move: Move | None) -> str:
    return "–" if move is None else change_text(move.change) + (" !" if move.harm else "")


def _sentence(method: str, reward: Mean | None, moves: dict[str, Move]) -> str:
    harmed = [name for name, move in moves.items() if move.harm]
    start = started_from(method)
    rise = "no reward measured" if reward is None else f"reward {mean_text(reward, signed=True)} against {start}"
    alone = reward is not None and reward.half is None
    told = f"worse: {', '.join(harmed)}" if harmed else "nothing else was seen to go against its direction"
    return f"{method}: {rise}; {told}{' (one seed)' if alone else ''}"


def _line(text: str) -> str:
    return " ".join(text.split())
