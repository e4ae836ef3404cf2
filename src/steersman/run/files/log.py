"""What a run tells while it goes: metrics.jsonl, samples.jsonl, health.jsonl, the console, and optional sinks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from steersman.atomic import refuse_links, saving, unlinked, write_atomic, write_now
from steersman.guards.terminal import printable
from steersman.jsonl import jsonl_text, read_jsonl
from steersman.run.console import duration_text, new_console
from steersman.run.files.sinks import Sinks
from steersman.run.health.watch import Finding
from steersman.types import Stats

FILES = ("metrics.jsonl", "samples.jsonl", "health.jsonl")
SOMETIMES = ("evaluation.jsonl",)
"""Files of runs that have something for them."""


class Log:
    """Appends to the run folder's files, row by row, and shows progress with the time left.

    `total` is the number of steps of the whole run. `resumed_step` is the step of the checkpoint that the run
    continues from (-1: from the start): rows of later steps are dropped, so that no curve is doubled.
    `headline` are the metrics on the progress line, in order, where they exist. On a terminal the line moves;
    elsewhere one plain line comes every `every` seconds. `sinks` are names of `run/files/sinks.py`.

    Raises SteersmanError for a sink that is unknown or not installed, where one of the files is a link, and where the
    disk is full.
    """

    def __init__(
        self,
        folder: Path,
        *,
        title: str,
        total: int,
        resumed_step: int = -1,
        headline: Sequence[str] = ("reward/total", "kl", "loss"),
        every: float = 5.0,
        sinks: Sequence[str] = (),
        console: Console | None = None,
    ) -> None:
        self.folder, self.title, self.total, self.headline, self.every = Path(folder), title, total, headline, every
        self.console = console or new_console()
        refuse_links(*(self.folder / name for name in FILES + SOMETIMES))
        for name in FILES + SOMETIMES:
            _truncate(self.folder / name, resumed_step)
        self._written = {
            (name, row.get("step"))
            for name in ("samples.jsonl", "evaluation.jsonl")
            for row in read_jsonl(self.folder / name)
        }
        rows = read_jsonl(self.folder / "metrics.jsonl")
        self._seconds_before = float(rows[-1].get("seconds", 0.0)) if rows else 0.0
        self._start = self._last_line = self._steps_from = time.monotonic()
        self._first_step = max(resumed_step, 0)
        self._files = {name: self._opened(name) for name in FILES}
        self._sinks = Sinks(sinks, self.folder, resumed_step, lambda text: self.note(text, style="yellow"))
        self._bar = _progress(self.console) if self.console.is_terminal else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=self._first_step, detail="")

    def step(self, step: int, stats: Stats) -> None:
        """One row of metrics.jsonl: `{"step", "seconds", ...stats}`; numbers that are not finite become text."""
        seconds = self._seconds_before + time.monotonic() - self._start
        self._append("metrics.jsonl", {"step": step, "seconds": round(seconds, 3), **stats})
        self._sinks.log(step, stats)
        self._show(step, stats)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of samples.jsonl: `{"step", "index", "prompt", "completion", "reward": {name: number}, ...}`.

        `index` tells which held prompt a row answers, so that the report can lay its answers side by side. The
        rows of a step are written once: a resumed run that looks again at the same weights adds nothing.
        """
        self._once("samples.jsonl", step, rows)

    def evaluation(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of evaluation.jsonl, the answers that metrics judged: `{"step", "index", "prompt", "completion",
        ...}`; those of a step are written once."""
        self._once("evaluation.jsonl", step, rows)

    def _once(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if (name, step) in self._written:
            return
        self._written.add((name, step))
        for row in rows:
            self._append(name, {"step": step, **row})

    def finding(self, finding: Finding) -> None:
        """A row of health.jsonl, and a line on the console."""
        self._append(
            "health.jsonl",
            {"step": finding.step, "code": finding.code, "severity": finding.severity, "text": finding.text},
        )
        style = {"note": "cyan", "warning": "yellow", "stop": "bold red"}[finding.severity]
        self.note(f"{finding.severity} at step {finding.step}: {finding.text}", style=style)

    def note(self, text: str, style: str | None = None) -> None:
        """A line on the console, above the progress line."""
        self.console.print(printable(text), style=style, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._sinks.close()
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self, name: str) -> FileIO:
        return open(self.folder / name, "ab", buffering=0, opener=unlinked)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with saving(self.folder / name):
            if name not in self._files:
                self._files[name] = self._opened(name)
            write_now(self._files[name], json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")

    def _show(self, step: int, stats: Stats) -> None:
        now = time.monotonic()
        headline = self.headline if self.total else tuple(stats)  # one that has no steps tells all at once
        detail = "  ".join(f"{k.removesuffix('/total')} {stats[k]:.4g}" for k in headline if k in stats)
        done = step - self._first_step
        if done <= 0:  # a look before the first step is no step of those that are left
            self._steps_from = now
        left = (now - self._steps_from) / done * max(self.total - step, 0) if done > 0 else math.nan
        detail += f"  {duration_text(left)} left" if step < self.total and math.isfinite(left) else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, detail=detail)
        elif done <= 1 or step >= self.total or now - self._last_line >= self.every:
            self._last_line = now
            place = f" {step}/{self.total}" if self.total else ""
            self.note(f"{self.title}{place}  {detail.strip()}")


class NoLog:
    """The log of a rank that keeps none."""

    def step(self, step: int, stats: Stats) -> None:
        return None

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        return None

    def evaluation(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        return None

    def finding(self, finding: Finding) -> None:
        return None

    def note(self, text: str, style: str | None = None) -> None:
        return None

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _truncate(path: Path, last: int) -> None:
    if path.exists():
        kept = [row for row in read_jsonl(path) if row.get("step", 0) <= last]
        write_atomic(path, jsonl_text(kept))


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: JSON has no NaN and no infinity, so those become "nan", "inf", "-inf"."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else str(number)


def _progress(console: Console) -> Progress:
    title, detail = (TextColumn(part, markup=False) for part in ("{task.description}", "{task.fields[detail]}"))
    return Progress(SpinnerColumn(), title, BarColumn(bar_width=20), MofNCompleteColumn(), detail, console=console)
