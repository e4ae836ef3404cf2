"""Label Studio's "JSON" export: pairwise choices and ratings."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from steersman.people.store.conversations import TurnText
from steersman.people.store.imported import STARS, ImportCounts, Told, told_of_item, told_time
from steersman.people.store.raters import imported_name
from steersman.types import SteersmanError

PROMPTS = ("prompt", "question", "instruction", "input", "query", "messages")
ANSWER = re.compile(r"(?<![a-z])(answer|response|text|completion|output|option|chosen|rejected)")
"""Found in the name of a field with an answer, at the beginning of a word: `context` is none."""
ANSWERS = {"pairwise": 2, "rating": 1}
"""How many answers a result of each type is about."""


def read_task(task: dict[str, Any], done: ImportCounts, *, stem: str, as_of: float) -> list[Told]:
    """What annotators said of a task; a result that is no judgement of answers is counted and left out.

    `as_of` is when the file was written; an annotation that says when it was changed last goes by that. Raises
    SteersmanError, which the caller gives a place.
    """
    data = task["data"]
    prompt_key = next((k for k in PROMPTS if data.get(k)), None)
    texts = {k: v for k, v in data.items() if isinstance(v, str) and v.strip() and k != prompt_key}
    answer_keys = [k for k in texts if ANSWER.search(k)]
    if prompt_key is None or not answer_keys:
        raise SteersmanError(
            f"no prompt ({', '.join(PROMPTS)}) beside answers (answer1, response_a, text2, ...) among its "
            f"fields {', '.join(data)}; rename them in the file"
        )
    told = []
    for annotation in task["annotations"]:
        if annotation.get("was_cancelled"):
            done.left_out["skipped by the annotator"] += 1
            continue
        who = annotation.get("completed_by")
        who = who.get("email") or who.get("id") if isinstance(who, dict) else who
        changed = annotation.get("updated_at") or annotation.get("created_at")
        when = as_of if changed is None else told_time(datetime.fromisoformat(changed).timestamp())
        lead_time = annotation.get("lead_time")
        for result in annotation["result"]:
            verdict, answers, settings, kind = _verdict(result, [data[k] for k in answer_keys])
            if kind is None:
                beside = f" beside the answers {', '.join(answer_keys)}" if result["type"] in ANSWERS else ""
                done.left_out[f"a result of the type {result['type']}{beside}"] += 1
                continue
            said = [TurnText(a) for a in answers]
            told.append(
                told_of_item(
                    stem, kind, data[prompt_key], said, verdict, settings=settings,
                    who=imported_name("label-studio", str(who)), source="label-studio", when=when, as_of=when,
                    seconds=None if lead_time is None else float(lead_time),
                )
            )  # fmt: skip
    return told


def _verdict(result: dict[str, Any], answers: list[str]) -> tuple[Any, list[str], dict[str, Any], Any]:
    value = result["value"]
    fits = len(answers) == ANSWERS.get(result["type"])
    if result["type"] == "pairwise" and fits:
        return {"choice": {"left": 0, "right": 1}[value["selected"]]}, answers, {}, "compare"
    if result["type"] == "rating" and fits:
        name = str(result["from_name"])
        settings = {"attributes": {name: [str(i + 1) for i in range(max(STARS, int(value["rating"])))]}}
        return {"scores": {name: int(value["rating"])}}, answers, settings, "rate"
    return None, answers, {}, None
