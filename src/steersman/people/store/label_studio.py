"""Label Studio's "JSON" export: pairwise choices and ratings.

An export does not say which answer an annotator saw on the left: that is the first name in `toName` of the
project's Pairwise tag, and the project's configuration is not in the file. (A choice made on the page has the name of
the Pairwise tag itself as its `to_name`.) The order of a task's fields says nothing: it is that of the file which the
task came from, or the database's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import permutations
from typing import Any

from steersman.guards.untrusted import is_number
from steersman.people.store.conversations import TurnText
from steersman.people.store.imported import (
    EMPTY,
    MOST_STEPS,
    SAME,
    STARS,
    ImportCounts,
    Told,
    odd_left_out,
    shown,
    told_of_item,
    told_time,
)
from steersman.people.store.items import LONGEST_NAME
from steersman.people.store.names import fitting
from steersman.people.store.raters import imported_name
from steersman.people.store.verdicts import storable
from steersman.types import SteersmanError

PROMPTS = ("prompt", "question", "instruction", "input", "query", "messages")
ANSWER = re.compile(r"(?<![a-z])(answer|response|text|completion|output|option|chosen|rejected)")
"""Found in the name of a field with an answer, at the beginning of a word: `context` is none."""
ENDS = (("1", "2"), ("0", "1"), ("a", "b"), ("left", "right"))
"""Of the names of two fields that are alike otherwise: the left one's, and the right one's."""
SIDES = {"left": 0, "right": 1}

Sides = tuple[str, str]
"""The fields with the left and the right answer."""


def is_label_studio(record: dict[str, Any]) -> bool:
    return isinstance(record.get("data"), dict) and isinstance(record.get("annotations"), list)


def is_json_min(record: dict[str, Any]) -> bool:
    """Whether a record is one of the export "JSON-MIN", which has no annotations, only their values."""
    return {"annotation_id", "annotator", "lead_time"} <= record.keys() and "annotations" not in record


@dataclass(frozen=True, slots=True)
class Fields:
    """Of a task: the prompt, all texts beside it by the name of their field, those of them that are answers by their
    names, and the names of all fields."""

    prompt: Any
    texts: dict[str, str]
    answers: tuple[str, ...]
    names: frozenset[str]

    @property
    def written(self) -> tuple[str, ...]:
        """The answers that are not empty."""
        return tuple(k for k in self.answers if self.texts[k].strip())


def read_task(
    task: dict[str, Any], done: ImportCounts, *, name: str, where: str, as_of: float, sides: Sides | None
) -> list[Told]:
    """What annotators said of a task of the export `name`; what is no judgement of answers is counted and left out.

    `sides` are the fields of the two answers of a comparison, or None where `to_name` or their names must tell.
    `as_of` is when the file was written; an annotation that says when it was changed last goes by that. Raises
    SteersmanError for a task without a prompt and answers.
    """
    fields = _fields(task["data"], sides)
    annotations = task.get("annotations") or []
    if not annotations:
        done.left_out["a task without annotations"] += 1
    told = list[Told]()
    nameless = 0
    for place, annotation in enumerate(annotations, 1):
        with odd_left_out(done, f"{where}, annotation {place}"):
            if annotation.get("was_cancelled") or not annotation["result"]:
                skipped = annotation.get("was_cancelled")
                done.left_out["skipped by the annotator" if skipped else "an annotation without a result"] += 1
                continue
            who = annotation.get("completed_by")
            who = who.get("email") or who.get("id") if isinstance(who, dict) else who
            if who is None:
                nameless += 1
                who = "unknown" if nameless == 1 else f"unknown, annotation {nameless}"
            changed = annotation.get("updated_at") or annotation.get("created_at")
            when = as_of if changed is None else told_time(datetime.fromisoformat(changed).timestamp())
            lead_time = annotation.get("lead_time")
            about = {
                "who": imported_name("label-studio", str(who)), "source": "label-studio", "when": when, "as_of": when,
                "seconds": None if lead_time is None else float(lead_time),
            }  # fmt: skip
            for kind, keys, verdict, settings in _verdicts(annotation["result"], fields, done, sides):
                said = [TurnText(fields.texts[k]) for k in keys]
                told.append(told_of_item(name, kind, fields.prompt, said, verdict, settings=settings, **about))
    return told


def _fields(data: dict[str, Any], sides: Sides | None) -> Fields:
    key = next((k for k in PROMPTS if data.get(k)), None)
    texts = {k: v for k, v in data.items() if isinstance(v, str) and k != key}
    answers = tuple(k for k in texts if ANSWER.search(k))
    if key is None or not (sides or answers):
        raise SteersmanError(
            f"no prompt ({', '.join(PROMPTS)}) beside answers (answer1, response_a, text2, ...) among its "
            f"fields; rename them in the file: {', '.join(data)}"
        )
    missing = [k for k in sides or () if k not in texts]
    if missing:
        raise SteersmanError(f"it has no text in {missing[0]}, which `sides` names; it has {', '.join(texts)}")
    return Fields(_prompt(data[key], key), texts, answers, frozenset(data))


def _prompt(prompt: Any, key: str) -> str | list[dict[str, str]]:
    """The prompt as a store takes it. Raises SteersmanError for what is neither text nor a list of messages."""
    if isinstance(prompt, str):
        return storable(prompt)
    if isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    ):
        return [{**m, "role": storable(m["role"]), "content": storable(m["content"])} for m in prompt]
    raise SteersmanError(f"its field {key} is neither text nor a list of messages with role and content")


Verdict = tuple[str, tuple[str, ...], dict[str, Any], dict[str, Any]]
"""The task, the fields of the answers, the verdict and the settings of the queue."""


def _verdicts(
    results: list[dict[str, Any]], fields: Fields, done: ImportCounts, sides: Sides | None
) -> Iterator[Verdict]:
    for result in results:
        kind = str(result["type"])
        if kind == "pairwise":
            answers = fields.written if len(fields.written) == 2 else fields.answers
            pair = sides or _named_sides(result, fields.texts) or _counted_sides(answers)
            yield from _pairwise(result, pair, fields.texts, done)
        elif kind == "rating":
            yield from _rating(result, fields, done)
        else:
            done.left_out[f"a result of the type {shown(kind)[:40]}"] += 1


def _pairwise(result: dict[str, Any], pair: Sides, texts: dict[str, str], done: ImportCounts) -> Iterator[Verdict]:
    left, right = (texts[k].strip() for k in pair)
    choice = SIDES[result["value"]["selected"]]
    if not left or not right or left == right:
        done.left_out[SAME if left and right else EMPTY] += 1
        return
    done.sides[pair] += 1
    yield "compare", pair, {"choice": choice}, {}


def _rating(result: dict[str, Any], fields: Fields, done: ImportCounts) -> Iterator[Verdict]:
    rating, of, answers = result["value"]["rating"], str(result.get("to_name")), fields.written
    if len(answers) != 1:
        done.left_out[f"a rating beside {len(answers)} fields of answers"] += 1
    elif of in fields.names and of not in answers:
        done.left_out["a rating of something else than the answer"] += 1
    elif not is_number(rating) or rating not in range(1, MOST_STEPS + 1):
        done.left_out[f"a rating that is no whole number from 1 to {MOST_STEPS}"] += 1
    else:
        name = fitting(str(result["from_name"]), LONGEST_NAME)
        settings = {"attributes": {name: [str(i + 1) for i in range(max(STARS, int(rating)))]}}
        yield "rate", answers, {"scores": {name: int(rating)}}, settings


def _named_sides(result: dict[str, Any], texts: dict[str, str]) -> Sides | None:
    """The two fields that the result itself names, left and right, as predictions of programs may."""
    named = result.get("to_name")
    names = named.split(",") if isinstance(named, str) else named if isinstance(named, list) else []
    found = [str(n).strip() for n in names]
    return (found[0], found[1]) if len(found) == 2 and all(n in texts for n in found) else None


def _counted_sides(answers: tuple[str, ...]) -> Sides:
    """Two fields whose names count their sides, such as answer1 and answer2. Raises SteersmanError for others."""
    for left, right in permutations(answers, 2) if len(answers) == 2 else ():
        for one, two in ENDS:
            if left.lower().endswith(one) and right.lower() == left.lower().removesuffix(one) + two:
                return left, right
    raise SteersmanError(
        "an export does not say which two answers were compared, and which was on the left: it is the first name in "
        "`toName` of the project's Pairwise tag. Put it into the recipe as `sides: {NAME OF THIS FILE: {left: FIELD, "
        f"right: FIELD}}}}`. Fields that may be answers: {', '.join(answers)}"
    )
