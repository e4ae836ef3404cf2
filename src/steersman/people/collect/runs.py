"""Runs on the disk as tables of rows: what was answered at which step, and what was trained on.

A run is any folder below the root that holds metrics or samples. Runs and tables go by names that were found in the
root beforehand, so that no name leads out of it. Rows were written by models and by others: they are read within
limits, and what is no row is passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from steersman.data import BadRows, read_rows
from steersman.guards.untrusted import UntrustedError, parse_json
from steersman.jsonl import read_jsonl
from steersman.types import SteersmanError

Row = dict[str, Any]
DEPTH, MOST_RUNS, MOST_ROWS, LONGEST_LINE = 6, 1000, 200_000, 1 << 20
TAIL = 1 << 16
"""Bytes at the end of a file in which its last row is looked for."""
SAMPLES, DATA = "samples", "data"
"""The tables of held-out answers, and of the rows that a run was trained on."""
ABOUT_ROUND = {
    "human/": ("readings", "kept"), "win_rate": ("collected",), "judge/": ("agreement", "answers-candidate"),
    "length": ("answers-candidate", "answers-current"), "distinct": ("answers-candidate", "answers-current"),
    "perplexity": ("answers-candidate",), "ended": ("answers-candidate",), "promoted": ("decision",),
}  # fmt: skip
"""Beginnings of the metrics of a round, and the tables of its folder that they are counted from."""


@dataclass(frozen=True, slots=True)
class Link:
    """Rows behind a number: of which table, of which step, ordered by which reward."""

    table: str
    step: int | None = None
    order: str = ""


@dataclass(slots=True)
class Run:
    """A run folder. `tables` are names to files, the data that it trained on among them."""

    name: str
    folder: Path
    tables: dict[str, Path] = field(default_factory=dict)

    def metrics(self) -> list[Row]:
        """The rows of metrics.jsonl, one a step."""
        return read_jsonl(self.folder / "metrics.jsonl")

    def last_step(self) -> Any:
        """The step of the last whole row of metrics.jsonl, of whose end alone is read; None where there is none."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return None
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read(TAIL).split(b"\n")
        return next((row["step"] for row in map(_row, reversed(lines)) if row is not None and "step" in row), None)

    def rows(self, table: str) -> Iterator[Row]:
        """The rows of a table, at most MOST_ROWS."""
        path = self.tables[table]
        if table.startswith(DATA):
            bad = BadRows("skip")
            yield from islice((row.data for row in read_rows(str(path), bad)), MOST_ROWS)
            return
        with path.open("rb") as file:
            for _ in range(MOST_ROWS):
                line = file.readline(LONGEST_LINE)
                if not line:
                    return
                row = _row(line)
                if row is not None:
                    yield row

    def sampled_steps(self) -> list[int]:
        """The steps at which held-out prompts were answered."""
        steps = {row["step"] for row in self.rows(SAMPLES) if isinstance(row.get("step"), int)}
        return sorted(steps)

    def behind(self, metric: str, step: int, sampled: set[int]) -> Link | None:
        """Where the rows are that a metric of a step was counted from, as far as they were kept."""
        for beginning, names in ABOUT_ROUND.items():
            for name in names:
                if metric.startswith(beginning) and f"round-{step:02d}/{name}" in self.tables:
                    return Link(f"round-{step:02d}/{name}")
        if metric.startswith("held_out/") and step in sampled:
            return Link(SAMPLES, step, metric.removeprefix("held_out/reward/") if "/reward/" in metric else "")
        if metric.startswith(("loss", "accuracy", "margin", "drift/")) and DATA in self.tables:
            return Link(DATA)
        return None


def find_runs(root: Path) -> dict[str, Run]:
    """The runs in a folder and below it by their path, which begins with its name. No link is followed."""
    found: dict[str, Run] = {}
    root = root.resolve()
    for place, folders, files in os.walk(root):
        here = Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in ("checkpoints", "model"))
        if len(here.relative_to(root).parts) >= DEPTH or len(found) >= MOST_RUNS:
            folders.clear()
        if "metrics.jsonl" in files or "samples.jsonl" in files:
            name = here.relative_to(root.parent).as_posix()
            found[name] = Run(name, here, _tables(here))
    return dict(sorted(found.items()))


def _row(line: bytes) -> Row | None:
    """The row that a line is, if it is one."""
    try:
        row = parse_json(line.decode(errors="replace"), "line")
    except (UntrustedError, ValueError):
        return None
    return row if isinstance(row, dict) else None


def _tables(folder: Path) -> dict[str, Path]:
    tables = {
        path.relative_to(folder).as_posix().removesuffix(".jsonl"): path
        for path in [folder / "samples.jsonl", *sorted(folder.glob("round-*/*.jsonl"))]
        if path.is_file() and not path.is_symlink()
    }
    return tables | {f"{DATA}{i or ''}": path for i, path in enumerate(_data(folder))}


def _data(folder: Path) -> list[Path]:
    """Files of rows that the run was trained on, as its inputs name them."""
    try:
        told = parse_json((folder / "inputs.json").read_text(encoding="utf-8"), "inputs.json")
    except (OSError, UntrustedError, ValueError):
        return []
    named = told.get("data.path") if isinstance(told, dict) else None
    paths = [Path(name) for name in named] if isinstance(named, dict) else []
    rows = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz")
    return [path for path in paths if path.name.endswith(rows) and path.is_file()]


def matches(row: Row, words: str) -> bool:
    """Whether every word stands somewhere in the row."""
    text = json.dumps(row, ensure_ascii=False, default=str).lower()
    return all(word in text for word in words.lower().split())


def rewards(row: Row) -> dict[str, float]:
    """The numbers of a row's rewards by name."""
    told = row.get("reward")
    named = told if isinstance(told, dict) else {"total": told}
    return {str(k): float(v) for k, v in named.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def beside(runs: list[Run]) -> tuple[list[str], list[tuple[Any, dict[str, Row]]]]:
    """The held-out answers of runs by prompt: the columns ("run: step"), and each prompt with its answers in them."""
    columns: dict[str, None] = {}
    answers: dict[str, tuple[Any, dict[str, Row]]] = {}
    for run in runs:
        for row in run.rows(SAMPLES):
            column = f"{run.name}: {row.get('step')}"
            columns[column] = None
            prompt = row.get("prompt")
            key = json.dumps(prompt, sort_keys=True, default=str)
            answers.setdefault(key, (prompt, {}))[1].setdefault(column, row)
    return list(columns), list(answers.values())


def open_root(folder: str | None) -> Path | None:
    """The folder of runs. Raises SteersmanError where it is none."""
    if folder is None:
        return None
    root = Path(folder)
    if not root.is_dir():
        raise SteersmanError(f"runs {folder}: there is no such folder; name one that holds run folders")
    return root
