"""wheel.html: what each turn of the wheel did and why, on one page without scripts or links to elsewhere."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steersman.atomic import write_atomic
from steersman.flywheel.players import text_of
from steersman.jsonl import read_jsonl
from steersman.people.wheel.recipe import LEARNS, WheelRecipe
from steersman.run.report.page import charts

Rows = list[dict[str, Any]]
SHOWN = 8
"""Held-out prompts whose answers are shown side by side."""


@dataclass(slots=True)
class TurnPage:
    """What is shown of a turn; what has not been made yet is empty."""

    number: int
    collected: Rows
    usable: int
    left_out: list[tuple[str, int]]
    mix: list[tuple[str, int, int, int]]
    stages: list[str]
    metrics: list[dict[str, Any]]
    agreement: str
    test: dict[str, Any] | None
    decision: dict[str, Any] | None
    answers: list[tuple[str, str, str]]
    tables: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def users(self) -> int:
        return len({row["user"] for row in self.collected})

    @property
    def gold(self) -> int:
        return sum("expected" in row for row in self.collected)


def write_page(folder: Path, recipe: WheelRecipe, summary: dict[str, Any]) -> Path:
    """Writes `wheel.html` into the run folder, from the tables that are there."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("steersman.people.wheel"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    turns = [_turn(folder, n, recipe) for n in range(1, recipe.turns + 1) if (folder / f"round-{n:02d}").is_dir()]
    page = environment.get_template("wheel.html.j2").render(
        name=folder.resolve().name, state=str(summary.get("state", "")), serving=summary.get("serving", ""),
        turns=turns, recipe=recipe, charts=_curves(read_jsonl(folder / "metrics.jsonl")),
        number=_number,
    )  # fmt: skip
    write_atomic(folder / "wheel.html", page)
    return folder / "wheel.html"


def _curves(rows: Rows) -> list[Any]:
    """What people say of each turn's candidate, where there are turns to compare."""
    kept = ("step", "human/accuracy", "win_rate")
    told = [{k: v for k, v in row.items() if k in kept} for row in rows if row.get("step")]
    return charts(told) if len(told) > 1 else []


def _turn(folder: Path, number: int, recipe: WheelRecipe) -> TurnPage:
    place = folder / f"round-{number:02d}"

    def rows(name: str) -> Rows:
        return read_jsonl(place / f"{name}.jsonl")

    gates = {row["metric"]: row for row in rows("gates")}
    measured = {row["metric"]: row for row in rows("evaluation")}
    metrics = [{**measured.get(name, {}), "metric": name, "gate": gates.get(name)} for name in {**measured, **gates}]
    decision, told = rows("decision"), rows("agreement")
    mix = []
    for kind in dict.fromkeys(LEARNS[stage] for stage in recipe.then):
        sources = Counter(row["source"] for row in rows(kind))
        mix.append((kind, sources["new"], sources["earlier"], sources["anchor"]))
    return TurnPage(
        number, rows("collected"), len(rows("kept")),
        Counter(row["reason"] for row in rows("left-out")).most_common(), mix,
        sorted(p.parent.name for p in place.glob("*/summary.json")), metrics,
        told[0].get("said", "") if told else "", decision[0]["test"] if decision else None,
        decision[0] if decision else None, _answers(rows("answers-current"), rows("answers-candidate")),
        [_provenance(p) for p in sorted(place.glob("*.provenance.json"))],
    )  # fmt: skip


def _answers(current: Rows, candidate: Rows) -> list[tuple[str, str, str]]:
    theirs = {row["index"]: row["completion"] for row in current}
    both = [(text_of(row["prompt"]), theirs.get(row["index"], ""), row["completion"]) for row in candidate]
    return both[:SHOWN]


def _provenance(path: Path) -> tuple[str, int, str]:
    told = json.loads(path.read_text(encoding="utf-8"))
    return told["file"], told["rows"], told["sha256"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")
