"""leaderboard.json: one entry per task, method, model and author, which others can add theirs to."""

from __future__ import annotations

import json
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steersman.atomic import write_atomic
from steersman.grue.evaluate import metrics_of
from steersman.grue.results import NATURAL, Group, Results
from steersman.types import SteersmanError

KEY = ("by", "task", "data", "held_out", "model", "method")
"""What makes an entry another one's successor. Entries compare only where task, data and held_out agree."""


def entries(results: Results) -> list[dict[str, Any]]:
    """This matrix's entries, one per task and method."""
    out, recipe = [], results.recipe
    for task in results.tasks:
        made = metrics_of(task)
        for method in results.methods(task):
            metrics = {}
            for group, name in results.columns(task):
                m = results.mean(task, method, group, name)
                if m is not None:
                    metrics[name if group != "reward" else "reward"] = {
                        "mean": m.value, "half_width": m.half, "seeds": m.count, "better": _better(made, group, name),
                        "by": made[name][0].implementation if group == "preference" else "steersman",
                    }  # fmt: skip
            prompts = [v["prompts"] for k, v in results.cells.items() if k[:2] == (task.name, method)]
            out.append({
                "by": "steersman", "version": version("steersman"), "date": date.today().isoformat(),
                "task": task.name, "data": recipe.data.source, "held_out": prompts[0],
                "model": recipe.model_name, "method": method, "metrics": metrics,
            })  # fmt: skip
    return out


def add(path: Path, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes the file with the new entries in the place of those with the same key; returns all.

    Raises SteersmanError where the file that is there is no leaderboard; it is left as it is then.
    """
    merged = {_key(e): e for e in [*read(path), *new]}
    write_atomic(path, json.dumps({"format": 1, "entries": list(merged.values())}, indent=1, ensure_ascii=False))
    return list(merged.values())


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a leaderboard file, none where there is no file; raises SteersmanError naming what is wrong."""
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SteersmanError(f"{path}: not whole JSON ({error}); mend it or move it away") from None
    found = data.get("entries") if isinstance(data, dict) else None
    if not isinstance(found, list) or data.get("format") != 1:
        raise SteersmanError(f'{path}: no leaderboard; it has the form {{"format": 1, "entries": [...]}}')
    for i, entry in enumerate(found):
        lacking = [k for k in (*KEY, "metrics") if not isinstance(entry, dict) or k not in entry]
        if lacking:
            raise SteersmanError(f"{path}, entry {i}: it has no {', '.join(lacking)}")
        for name, value in entry["metrics"].items() if isinstance(entry["metrics"], dict) else [("metrics", None)]:
            if not isinstance(value, dict) or not isinstance(value.get("mean"), int | float):
                raise SteersmanError(f'{path}, entry {i}: {name} needs a mean: {{"mean": 0.31, "half_width": null}}')
    return found


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[k] for k in KEY)


def _better(made: dict[str, Any], group: Group, name: str) -> str:
    return "higher" if group == "reward" else NATURAL[name] if group == "natural" else made[name][0].better
