"""Label Studio's "JSON" export: pairwise choices and ratings."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy.orm import Session

from steersman.people.store.conversations import TurnText
from steersman.people.store.database import now
from steersman.people.store.imported import STARS, ImportCounts, import_item, import_judgement
from steersman.people.store.raters import imported_rater
from steersman.people.store.verdicts import checked
from steersman.types import SteersmanError

PROMPTS = ("prompt", "question", "instruction", "input", "query", "messages")
ANSWER = re.compile(r"(?<![a-z])(answer|response|text|completion|output|option|chosen|rejected)")
"""Found in the name of a field with an answer, at the beginning of a word: `context` is none."""
ANSWERS = {"pairwise": 2, "rating": 1}
"""How many answers a result of each type is about."""


def import_task(session: Session, task: dict[str, Any], stem: str, where: str, done: ImportCounts) -> None:
    data = task["data"]
    prompt_key = next((k for k in PROMPTS if data.get(k)), None)
    texts = {k: v for k, v in data.items() if isinstance(v, str) and v.strip() and k != prompt_key}
    answer_keys = [k for k in texts if ANSWER.search(k)]
    if prompt_key is None or not answer_keys:
        raise SteersmanError(
            f"{where}: no prompt ({', '.join(PROMPTS)}) beside answers (answer1, response_a, text2, ...) among its "
            f"fields {', '.join(data)}; rename them in the file"
        )
    for annotation in task["annotations"]:
        who = annotation.get("completed_by")
        who = who.get("email") or who.get("id") if isinstance(who, dict) else who
        rater = imported_rater(session, "label-studio", str(who))
        if annotation.get("was_cancelled"):
            done.left_out["skipped by the annotator"] += 1
            continue
        for result in annotation["result"]:
            verdict, answers, settings, kind = _verdict(result, [data[k] for k in answer_keys])
            if kind is None:
                beside = f" beside the answers {', '.join(answer_keys)}" if result["type"] in ANSWERS else ""
                done.left_out[f"a result of the type {result['type']}{beside}"] += 1
                continue
            item = import_item(session, stem, kind, data[prompt_key], [TurnText(a) for a in answers], settings)
            key = ("label-studio", stem, task["id"], annotation["id"], result.get("id", result["from_name"]))
            import_judgement(
                session, done, kind, key, rater, checked(kind, verdict, answers, settings), "label-studio", now(),
                item_id=item.id, seconds=annotation.get("lead_time"),
            )  # fmt: skip


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
