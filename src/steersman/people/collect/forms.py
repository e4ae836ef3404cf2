"""What a browser's form says -> the verdict of a task. Sides on the screen become numbers of answers here."""

from __future__ import annotations

import json
import math
from typing import Any

from steersman.people.store.assignments import ShownItem
from steersman.people.store.verdicts import Verdict
from steersman.types import SteersmanError

REASONS = ("r_wrong", "r_unclear", "r_unsafe", "r_style", "r_helpful")


def verdict_of(form: Any, shown: ShownItem) -> Verdict:
    """The verdict on an item. Raises SteersmanError where the form holds none."""
    if form.get("skip"):
        return {"skip": text_of(form, "reason")}
    return _READ[shown.queue.task](form, shown)


def thumb_of(form: Any) -> Verdict:
    """A thumb with its reasons and correction."""
    reasons = [name for name in REASONS if form.get(name)]
    return {"up": form.get("up") == "1", "reasons": reasons, "correction": text_of(form, "correction")}


def text_of(form: Any, name: str) -> str:
    """What was written into a field, empty where the form has none; a browser sends its line ends as CR LF."""
    return str(form.get(name, "")).replace("\r\n", "\n")


def seconds_of(form: Any) -> float | None:
    """How long the page was looked at, as the browser counted."""
    try:
        got = float(form.get("seconds") or "nan")
    except ValueError:
        return None
    return got if math.isfinite(got) else None


def _compare(form: Any, shown: ShownItem) -> Verdict:
    said = form.get("choice")
    if said in ("A", "B"):
        return {"choice": shown.assignment.sides["AB".index(said)]}
    return {"choice": said}


def _rank(form: Any, shown: ShownItem) -> Verdict:
    ranks: list[int] = [0] * len(shown.answers)
    for side, number in enumerate(shown.assignment.sides):
        ranks[number] = _whole(form.get(f"rank-{side}"))
    return {"ranks": ranks}


def _rate(form: Any, shown: ShownItem) -> Verdict:
    names = list(shown.queue.settings["attributes"])
    return {"scores": {name: _whole(form.get(f"score-{i}")) for i, name in enumerate(names)}}


def _mark(form: Any, shown: ShownItem) -> Verdict:
    try:
        return {"spans": json.loads(str(form.get("spans") or "[]"))}
    except (ValueError, RecursionError):
        raise SteersmanError("mark: the spans are no JSON list") from None


def _review(form: Any, shown: ShownItem) -> Verdict:
    return {"accept": form.get("accept") == "1", "correction": text_of(form, "correction")}


def _whole(text: Any) -> int:
    try:
        return int(str(text)[:9])
    except ValueError:
        raise SteersmanError("every answer and every attribute needs a number") from None


_READ = {"compare": _compare, "rank": _rank, "rate": _rate, "mark": _mark, "review": _review}
