"""What people said about answers, as rows: who, when, on what, about which models, and what they chose.

The store, a file, or a program of one's own gives them: whatever iterates over `Judgement`s will do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any, Literal, Protocol

from steersman.data import BadRows, Row, RowError, read_rows
from steersman.data import fields as f
from steersman.data.examples import Content, is_empty
from steersman.data.read import local_files
from steersman.types import SteersmanError

Choice = Literal["first", "second", "tie", "both_bad"]
CHOICES: tuple[Choice, ...] = ("first", "second", "tie", "both_bad")


@dataclass(frozen=True, slots=True)
class Judgement:
    """One judgement: a choice between two answers (`choice`), or a thumb on one (`label`).

    `time` counts seconds since 1970, `seconds` those that the judgement took. `correction` is what the person would
    have answered. `expected` is set on gold items: what whoever reads the answers says. `models` may be empty, and so
    may `sides`: the numbers of the answers in the order in which they stood on the screen. `cut` says that the limit
    on its length cut an answer.
    """

    id: str
    user: str
    time: float
    prompt: Content
    answers: tuple[str, ...]
    models: tuple[str, ...] = ()
    choice: Choice | None = None
    label: bool | None = None
    reasons: tuple[str, ...] = ()
    correction: str = ""
    seconds: float | None = None
    expected: Choice | bool | None = None
    sides: tuple[int, ...] = ()
    cut: bool = False

    @property
    def side(self) -> Choice | None:
        """What was pressed: the first or second answer on the screen, tie or both_bad; None where nobody knows."""
        if self.choice in ("tie", "both_bad") or self.choice is None:
            return self.choice
        if not self.sides:
            return None
        return self.choice if self.sides[0] == 0 else "second" if self.choice == "first" else "first"

    @property
    def share(self) -> float:
        """Of the first answer: 1 chosen, 0 not, 0.5 for a tie or two bad ones; of a thumb 1 up, 0 down."""
        if self.choice is None:
            return float(bool(self.label))
        return {"first": 1.0, "second": 0.0}.get(self.choice, 0.5)

    @property
    def gold_failed(self) -> bool:
        """Whether this is a gold item that was answered otherwise than expected."""
        return self.expected is not None and self.expected not in (self.choice, self.label)


class Judgements(Protocol):
    """A source of judgements, oldest first; iterated anew each time it is asked."""

    def __iter__(self) -> Iterator[Judgement]: ...


class JudgementFiles:
    """Judgements of a file or a folder (jsonl, json, csv, ...), in the order of their times.

    A row has `user`, `prompt` (text or turns), and `answers` (two) with `choice` (first, second, tie, both_bad), or
    `completion` with `label` (a thumb); and it may have `id`, `time` (ISO 8601 or seconds), `models` (or `model`),
    `reasons`, `correction`, `seconds`, `expected`, `sides` and `cut`. A row without `time` is as late as the row
    before it (files go by their names). The same id twice is one judgement; a row without one goes by its file's path
    below the folder, or the file's name, and its number, from wherever it is read.

    Raises SteersmanError (file, row, field) at a row that is none of these, or skips and counts it if `bad` says so.
    """

    def __init__(self, path: str | Path, bad: BadRows | None = None) -> None:
        self.path, self.bad = path, bad or BadRows(key=None)

    def __iter__(self) -> Iterator[Judgement]:
        if local_files(self.path) is None:
            raise SteersmanError(f"{self.path}: there is no file or folder of judgements")
        found: dict[str, Judgement] = {}
        before, base = 0.0, _base(self.path)
        for row in read_rows(self.path, self.bad):
            try:
                one = judgement(row, before)
                if row.data.get("id") in (None, ""):
                    one = replace(one, id=f"{os.path.relpath(row.file, base)}:{row.number}")
            except RowError as error:
                self.bad.add(error)
                continue
            before = one.time
            found.setdefault(one.id, one)
        yield from in_order(found.values())


def _base(place: str | Path) -> Path:
    """The folder that files' names go from: of a pattern the one that no wildcard is in."""
    path = Path(place).expanduser()
    fixed = Path(*takewhile(lambda part: not set(part) & set("*?["), path.parts))
    return path if path.is_dir() else path.parent if fixed == path else fixed


def in_order(rows: Iterable[Judgement]) -> list[Judgement]:
    """By time; what came at the same time stays in its order."""
    return sorted(rows, key=lambda j: j.time)


def newest(rows: Iterable[Judgement]) -> list[Judgement]:
    """By time, of one user's judgements of the same answers of the same models to one prompt only the last."""
    last: dict[tuple[str, str], Judgement] = {}
    for one in in_order(rows):
        about = json.dumps([one.prompt, sorted(zip_longest(one.answers, one.models, fillvalue=""))])
        last.pop((one.user, about), None)
        last[one.user, about] = one
    return list(last.values())


def judgement(row: Row, before: float = 0.0) -> Judgement:
    """The judgement of a row, at the time `before` where it names none; raises RowError where it holds none."""
    prompt = f.content(row, "prompt")
    if is_empty(prompt):
        raise row.fault("empty prompt", "the prompt is empty", "prompt")
    pair = row.data.get("answers") is not None
    answers = tuple(_said(row, x) for x in f.listing(row, "answers")) if pair else (f.text(row, "completion"),)
    if pair and len(answers) != 2:
        raise row.fault("wrong number of answers", f"a choice is between two answers, not {len(answers)}", "answers")
    models = row.data.get("models", [row.data["model"]] if row.data.get("model") is not None else [])
    if not isinstance(models, list) or len(models) not in (0, len(answers)):
        raise row.fault("wrong number of models", "name one model for each answer, or none", "models")
    expected = None
    if row.data.get("expected") is not None:
        expected = choice(row, "expected") if pair else f.label(row, "expected")
    return Judgement(
        id=str(row.data.get("id", f"{row.file}:{row.number}")),
        user=name(row, "user"),
        time=when(row, before),
        prompt=prompt,
        answers=answers,
        models=tuple(str(m) for m in models),
        choice=choice(row, "choice") if pair else None,
        label=None if pair else f.label(row, "label"),
        reasons=tuple(str(r) for r in row.data.get("reasons") or ()),
        correction=f.optional_text(row, "correction"),
        seconds=f.optional_number(row, "seconds"),
        expected=expected,
        sides=_sides(row) if pair else (),
        cut=f.label(row, "cut") if row.data.get("cut") is not None else False,
    )


def plain(one: Judgement) -> dict[str, Any]:
    """The row that `judgement` reads back."""
    told: dict[str, Any] = {"id": one.id, "user": one.user, "time": one.time, "prompt": one.prompt}
    if one.choice is not None:
        told |= {"answers": list(one.answers), "choice": one.choice}
    else:
        told |= {"completion": one.answers[0], "label": one.label}
    more = {
        "models": list(one.models), "reasons": list(one.reasons), "correction": one.correction,
        "seconds": one.seconds, "expected": one.expected, "sides": list(one.sides),
        "cut": one.cut or None,
    }  # fmt: skip
    return told | {k: v for k, v in more.items() if v not in ([], "", None)}


def choice(row: Row, column: str) -> Choice:
    """Which of two answers; also as 0 and 1."""
    got = f.value(row, column)
    word = {"0": "first", "1": "second"}.get(str(got), str(got)) if not isinstance(got, bool) else str(got)
    for known in CHOICES:
        if word == known:
            return known
    raise row.fault("wrong choice", f"must be one of {', '.join(CHOICES)}, not {str(got)[:40]!r}", column)


def name(row: Row, column: str) -> str:
    """A name of someone or something: text that is not empty, or a whole number."""
    got = f.value(row, column)
    if isinstance(got, bool) or not isinstance(got, str | int) or not str(got).strip():
        raise row.fault("wrong type", f"must be a name, not {str(got)[:40]!r}", column)
    return str(got)


def when(row: Row, before: float) -> float:
    """`time` as seconds since 1970; `before`, the time of the row before it, where a row has none."""
    got = row.data.get("time")
    if got is None:
        return before
    if isinstance(got, str) and not got.replace(".", "", 1).isdigit():
        try:
            told = datetime.fromisoformat(got)
        except ValueError:
            raise row.fault("wrong time", f"must be ISO 8601 or seconds, not {got[:40]!r}", "time") from None
        return (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp()
    return f.number(row, "time")


def _sides(row: Row) -> tuple[int, ...]:
    got = row.data.get("sides")
    if got is not None and got not in ([0, 1], [1, 0]):
        raise row.fault(
            "wrong sides", f"must be [0, 1] or [1, 0], the answers as they stood, not {str(got)[:40]}", "sides"
        )
    return tuple(got or ())


def _said(row: Row, item: Any) -> str:
    if not isinstance(item, str):
        raise row.fault("wrong type", f"an answer must be text, not {type(item).__name__}", "answers")
    return item
