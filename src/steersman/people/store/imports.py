"""Judgements that other programs collected: Open WebUI's exports, Label Studio's, and any file of the data room.

Everything has an id that follows from the source's own, so that what is imported again is not stored twice.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from steersman.data import DataConfig, RowError
from steersman.data.examples import Content, Demonstration, Example, Feedback, Preference, Ranking, Rating
from steersman.data.load import load, recognise_kind
from steersman.people.store.conversations import TurnText, model_id
from steersman.people.store.database import Store, now
from steersman.people.store.items import NewItem, add_item, make_queue
from steersman.people.store.judgements import store_imported
from steersman.people.store.raters import imported_rater
from steersman.people.store.schema import Conversation, Item, JudgementRow, Turn
from steersman.people.store.verdicts import checked, storable
from steersman.run.untrusted import UntrustedError, parse_json
from steersman.types import SteersmanError

SPACE = uuid.UUID("5e4b1c5e-7a0f-4d1b-9a55-1b7e0d4f3c21")
PROMPTS = ("prompt", "question", "instruction", "input", "query", "messages")
STARS = 5
"""Steps of a scale whose export does not say how long it is."""


@dataclass(slots=True)
class ImportCounts:
    """What an import did: rows stored by task, and rows left out by reason."""

    stored: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


def import_file(store: Store, path: str | Path) -> ImportCounts:
    """Takes over the judgements of a file; all or, where it raises, nothing.

    Raises SteersmanError, with file and record, for a file that is none of the kinds that are known.
    """
    path = Path(path)
    done = ImportCounts()
    records = _json_records(path)
    with store.begin() as session:
        if records and _is_webui(records[0]):
            for number, record in enumerate(records, 1):
                _guarded(f"{path}, record {number}", lambda r=record: _webui(session, r, done))
        elif records and isinstance(records[0].get("annotations"), list) and isinstance(records[0].get("data"), dict):
            for number, record in enumerate(records, 1):
                where = f"{path}, task {number}"
                _guarded(where, lambda r=record, w=where: _label_studio(session, r, path.stem, w, done))
        else:
            _data_file(session, path, done)
    return done


def _json_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list; none where the file is something else, which the data room then reads."""
    if path.suffix.lower() != ".json":
        return []
    try:
        got = parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise SteersmanError(f"{path}: it can not be read ({error.strerror})") from None
    except (UntrustedError, ValueError) as error:
        raise SteersmanError(f"{path}: no JSON that can be read ({error})") from None
    return got if isinstance(got, list) and got and all(isinstance(r, dict) for r in got) else []


def _guarded(where: str, work: Any) -> None:
    try:
        work()
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise SteersmanError(f"{where}: not as this program writes it ({type(error).__name__}: {error})") from error


def _id(*parts: Any) -> str:
    return str(uuid.uuid5(SPACE, "\0".join(map(str, parts))))


# Open WebUI: "Export All Chats" and "Export feedback"


def _is_webui(record: dict[str, Any]) -> bool:
    return _history(record) is not None


def _history(record: dict[str, Any]) -> dict[str, Any] | None:
    """The tree of messages of a chat, or of the chat at the time of a feedback."""
    snapshot = record.get("snapshot")
    chat = (snapshot.get("chat") or {}).get("chat") if isinstance(snapshot, dict) else record.get("chat")
    history = chat.get("history") if isinstance(chat, dict) else None
    messages = history.get("messages") if isinstance(history, dict) else None
    return messages if isinstance(messages, dict) else None


def _webui(session: Session, record: dict[str, Any], done: ImportCounts) -> None:
    messages = _history(record)
    if messages is None:
        done.left_out["no conversation in the record"] += 1
        return
    is_feedback = "snapshot" in record
    chat_id = str((record.get("meta") or {}).get("chat_id") or record["id"]) if is_feedback else str(record["id"])
    rater = imported_rater(session, "open-webui", str(record.get("user_id") or "unknown"))
    turns = _webui_turns(session, chat_id, rater, messages)
    if is_feedback:
        message_id, said = str(record["meta"]["message_id"]), record["data"]
        _webui_thumb(session, turns, messages, message_id, said, rater, done, _when(record))
        return
    for message_id, message in messages.items():
        if isinstance(message.get("annotation"), dict):
            when = float(message.get("timestamp") or now())
            _webui_thumb(session, turns, messages, message_id, message["annotation"], rater, done, when)


def _webui_turns(session: Session, chat_id: str, rater: int, messages: dict[str, Any]) -> dict[str, Turn]:
    of = session.get(Conversation, _id("webui", chat_id))
    if of is None:
        of = Conversation(
            id=_id("webui", chat_id), rater_id=rater, created=now(), title="", source="open-webui", leaf_id=None
        )
        session.add(of)
        session.flush()
    turns: dict[str, Turn] = {}
    waiting = dict(messages)
    while waiting:
        ready = [i for i, m in waiting.items() if m.get("parentId") is None or m["parentId"] in turns]
        if not ready:
            break  # what hangs on a message that is not there, or on itself
        for message_id in ready:
            turns[message_id] = _webui_turn(session, of, message_id, waiting.pop(message_id), turns)
    return turns


def _webui_turn(
    session: Session, of: Conversation, message_id: str, m: dict[str, Any], turns: dict[str, Turn]
) -> Turn:
    found = session.get(Turn, _id("webui", of.id, message_id))
    if found is None:
        parent = turns[m["parentId"]].id if m.get("parentId") is not None else None
        model = (str(m["model"]), "") if m.get("model") else None
        role = str(m["role"])
        if role not in ("user", "assistant", "system"):
            raise ValueError(f"a message has the role {role[:20]!r}")
        found = Turn(
            id=_id("webui", of.id, message_id), conversation_id=of.id, parent_id=parent, role=role,
            content=storable(str(m.get("content") or "")), model_id=model_id(session, model), sampling=None,
            finish=None, seconds=None, created=float(m.get("timestamp") or now()),
        )  # fmt: skip
        session.add(found)
        session.flush()
    of.leaf_id = found.id
    if found.role == "user" and not of.title:
        of.title = " ".join(found.content.split())[:80]
    return found


def _webui_thumb(
    session: Session,
    turns: dict[str, Turn],
    messages: dict[str, Any],
    message_id: str,
    said: dict[str, Any],
    rater: int,
    done: ImportCounts,
    when: float,
) -> None:
    """A thumb; where the same question was answered by another model beside it, a comparison, too."""
    rating = said.get("rating")
    if rating not in (1, -1) or message_id not in turns:
        done.left_out["no thumb" if rating not in (1, -1) else "the message is not in the conversation"] += 1
        return
    turn = turns[message_id]
    reasons = [str(r) for r in (said.get("reason"), said.get("comment")) if r]
    verdict = checked("thumb", {"up": rating == 1, "reasons": reasons}, [turn.content], {})
    _store(session, done, "thumb", ("webui", turn.id, rater), rater, verdict, "open-webui", when, turn_id=turn.id)
    beside = [
        turns[i] for i, m in messages.items()
        if i in turns and i != message_id and m.get("parentId") == messages[message_id].get("parentId")
        and m.get("role") == "assistant" and m.get("model") != messages[message_id].get("model")
    ]  # fmt: skip
    if len(beside) == 1 and said.get("sibling_model_ids") and turn.content.strip() != beside[0].content.strip():
        prompt = _before(turns, turn)
        answers = [TurnText(t.content, _named(messages, turns, t)) for t in (turn, beside[0])]
        item = _item(session, "open-webui", "compare", prompt, answers, {})
        choice = {"choice": 0 if rating == 1 else 1}
        _store(
            session,
            done,
            "compare",
            ("webui pair", turn.id, rater),
            rater,
            choice,
            "open-webui",
            when,
            item_id=item.id,
        )


def _before(turns: dict[str, Turn], turn: Turn) -> list[dict[str, str]]:
    by_id = {t.id: t for t in turns.values()}
    out, at = [], turn.parent_id
    while at is not None:
        out.append({"role": by_id[at].role, "content": by_id[at].content})
        at = by_id[at].parent_id
    return out[::-1]


def _named(messages: dict[str, Any], turns: dict[str, Turn], turn: Turn) -> tuple[str, str] | None:
    name = next((m.get("model") for i, m in messages.items() if turns.get(i) is turn), None)
    return (str(name), "") if name else None


def _when(record: dict[str, Any]) -> float:
    return float(record.get("created_at") or now())


# Label Studio: "JSON"


def _label_studio(session: Session, task: dict[str, Any], stem: str, where: str, done: ImportCounts) -> None:
    data = task["data"]
    prompt_key = next((k for k in PROMPTS if data.get(k)), None)
    texts = {k: v for k, v in data.items() if isinstance(v, str) and v.strip() and k != prompt_key}
    answer_keys = [
        k for k in texts if re.search(r"(answer|response|text|completion|output|option|chosen|rejected)", k)
    ]
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
            verdict, answers, settings, kind = _label_studio_verdict(result, [data[k] for k in answer_keys])
            if kind is None:
                done.left_out[f"a result of the type {result.get('type')}"] += 1
                continue
            item = _item(session, stem, kind, data[prompt_key], [TurnText(a) for a in answers], settings)
            key = ("label-studio", stem, task["id"], annotation["id"], result.get("id", result["from_name"]))
            _store(
                session, done, kind, key, rater, checked(kind, verdict, answers, settings), "label-studio", now(),
                item_id=item.id, seconds=annotation.get("lead_time"),
            )  # fmt: skip


def _label_studio_verdict(result: dict[str, Any], answers: list[str]) -> tuple[Any, list[str], dict[str, Any], Any]:
    value = result["value"]
    if result["type"] == "pairwise" and len(answers) == 2:
        return {"choice": {"left": 0, "right": 1}[value["selected"]]}, answers, {}, "compare"
    if result["type"] == "rating" and len(answers) == 1:
        name = str(result["from_name"])
        settings = {"attributes": {name: [str(i + 1) for i in range(max(STARS, int(value["rating"])))]}}
        return {"scores": {name: int(value["rating"])}}, answers, settings, "rate"
    return None, answers, {}, None


# Any file of the data room


def _data_file(session: Session, path: Path, done: ImportCounts) -> None:
    config = DataConfig(path=str(path), ties="keep")
    kind = recognise_kind(config, ("preference", "ranking", "rating", "feedback", "demonstration"))
    examples: list[Example] = load(config, kind).train
    rater = imported_rater(session, "file", path.name)
    for one in examples:
        try:
            task, answers, verdict, settings = _example(one)
        except ValueError as error:
            raise RowError("no judgement", f"{one.row.where()}: {error}") from None
        item = _item(session, path.stem, task, one.prompt, [TurnText(a) for a in answers], settings)
        key = ("file", item.id, one.row.number)
        said = checked(task, verdict, answers, settings)
        _store(session, done, task, key, rater, said, path.name, now(), item_id=item.id)


def _example(one: Example) -> tuple[str, list[str], Any, dict[str, Any]]:
    """(task, answers, verdict, settings of the queue) of a typed example."""
    if not one.prompt:
        raise ValueError("a text without a prompt is no answer that was judged")
    match one:
        case Preference():
            choice = "tie" if one.agreement == 0.5 else 0
            return "compare", [_text(one.chosen), _text(one.rejected)], {"choice": choice}, {}
        case Ranking():
            order = sorted(set(one.ranks))
            ranks = [order.index(r) for r in one.ranks]
            return "rank", [_text(c) for c in one.completions], {"ranks": ranks}, {}
        case Rating():
            if any(s != int(s) or s < 1 for s in one.scores.values()):
                raise ValueError("ratings must be whole numbers from 1 on")
            scores = {name: int(s) for name, s in one.scores.items()}
            steps = {name: [str(i + 1) for i in range(max(STARS, s))] for name, s in scores.items()}
            return "rate", [_text(one.completion)], {"scores": scores}, {"attributes": steps}
        case Feedback():
            return "review", [_text(one.completion)], {"accept": one.label}, {}
        case Demonstration():
            return "review", [_text(one.completion)], {"accept": True}, {}
    raise ValueError("rows with neither answers nor verdicts hold no judgement")


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    if len(content) != 1:
        raise ValueError("an answer of several turns can not be judged as one")
    return str(content[0]["content"])


def _item(
    session: Session, name: str, task: str, prompt: Any, answers: list[TurnText], settings: dict[str, Any]
) -> Item:
    """The item of an import's queue, which nobody is asked to judge (its overlap is 0)."""
    queue = make_queue(session, f"{name} ({task})"[:100], task, overlap=0, **settings)
    digest_id = _id(queue.name, repr(prompt), *(a.content for a in answers))
    found = session.get(Item, digest_id)
    if found is not None:
        return found
    made = add_item(session, queue, NewItem(prompt, answers, source=name), item_id=digest_id)
    if made is None:
        raise SteersmanError(f"{name}: an item is there already under another id")
    return made


def _store(
    session: Session,
    done: ImportCounts,
    task: str,
    key: tuple[Any, ...],
    rater: int,
    verdict: dict[str, Any],
    source: str,
    when: float,
    **more: Any,
) -> None:
    row = JudgementRow(
        key=_id(*key), rater_id=rater, task=task, verdict=verdict, created=when, source=source,
        sides=None, **({"seconds": None} | more),
    )  # fmt: skip
    if store_imported(session, row):
        done.stored[task] += 1
    else:
        done.left_out["there already"] += 1
