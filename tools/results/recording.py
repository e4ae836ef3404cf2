"""What the scripts of this folder share: resumable runs of verbs, numbers over seeds, axes."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OPENINGS = {"text_split": "<|endoftext|>", "opening_words": 8, "held_out": 64, "limit": 800}
"""Story openings of a text file as prompts, 64 of them held out."""
TABLES, READING = "<!-- tables -->", "## What it says"
"""On a results page the tables stand between these; the words before and after are written by hand."""


def options(
    doc: str | None,
    steps: Sequence[str],
    out: str,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    minutes: float = float("inf"),
) -> argparse.ArgumentParser:
    """What every script that runs and then draws is asked: which step, where to, which seeds, for how long."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(steps))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--minutes", type=float, default=minutes)
    return parser


def verb(module: Any, recipe_class: Any, folder: Path, seed: int, values: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run in `folder`, made now or found there."""
    if (summary := finished(folder)) is not None:
        return summary
    run = {"dir": str(folder), "seed": seed, "threads": 1, **values.get("run", {})}
    summary = module.run(recipe_class.model_validate({**values, "run": run}), resume=folder.exists())
    if not summary["finished"]:
        raise SystemExit(f"{folder}: stopped; the same command goes on")
    return summary


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary that a finished run left in its folder; None where there is none yet."""
    file = folder / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else None
    return summary if summary is not None and summary["finished"] else None


def run_cells(cells: Sequence[tuple[Path, Callable[[], Any]]], minutes: float) -> bool:
    """Runs the cells whose folder holds no finished run, and begins none after `minutes` of CPU time.

    Returns whether all are finished.
    """
    start = time.process_time()
    for folder, make in cells:
        if finished(folder) is not None:
            continue
        if time.process_time() - start > 60 * minutes:
            print("time is up; the same command goes on")
            return False
        make()
    return True


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (0 of a single value) and the values themselves."""
    spread = stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(mean(values), 4), "sd": round(spread, 4), "values": list(values)}


def plain_axes(axis: plt.Axes, title: str = "") -> None:
    """Small ticks, a light grid, no frame above and right."""
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def rewrite(page: Path, tables: str) -> None:
    """Puts the tables into a page between its mark and its own reading of them, and prints them."""
    text = page.read_text()
    before, after = text.split(TABLES)[0], text[text.index(READING) :]
    page.write_text(f"{before}{TABLES}\n\n{tables}\n{after}")
    print(tables)
