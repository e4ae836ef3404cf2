"""Open WebUI's "Export All Chats" and "Export feedback": chats, their thumbs, and comparisons of two models."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from steersman.people.store.conversations import TurnText, model_id
from steersman.people.store.database import now
from steersman.people.store.imported import ImportCounts, import_item, import_judgement, source_id
from steersman.people.store.raters import imported_rater
from steersman.people.store.schema import Conversation, Turn
from steersman.people.store.verdicts import checked, storable


def is_open_webui(record: dict[str, Any]) -> bool:
    return _history(record) is not None


def _history(record: dict[str, Any]) -> dict[str, Any] | None:
    """The tree of messages of a chat, or of the chat at the time of a feedback."""
    snapshot = record.get("snapshot")
    chat = (snapshot.get("chat") or {}).get("chat") if isinstance(snapshot, dict) else record.get("chat")
    history = chat.get("history") if isinstance(chat, dict) else None
    messages = history.get("messages") if isinstance(history, dict) else None
    return messages if isinstance(messages, dict) else None


def import_record(session: Session, record: dict[str, Any], done: ImportCounts) -> None:
    messages = _history(record)
    if messages is None:
        done.left_out["no conversation in the record"] += 1
        return
    is_feedback = "snapshot" in record
    chat_id = str((record.get("meta") or {}).get("chat_id") or record["id"]) if is_feedback else str(record["id"])
    rater = imported_rater(session, "open-webui", str(record.get("user_id") or "unknown"))
    turns = _turns(session, chat_id, rater, messages)
    if is_feedback:
        message_id, said = str(record["meta"]["message_id"]), record["data"]
        _thumb(session, turns, messages, message_id, said, rater, done, _when(record))
        return
    for message_id, message in messages.items():
        if isinstance(message.get("annotation"), dict):
            when = float(message.get("timestamp") or now())
            _thumb(session, turns, messages, message_id, message["annotation"], rater, done, when)


def _turns(session: Session, chat_id: str, rater: int, messages: dict[str, Any]) -> dict[str, Turn]:
    of = session.get(Conversation, source_id("webui", chat_id))
    if of is None:
        of = Conversation(
            id=source_id("webui", chat_id), rater_id=rater, created=now(), title="", source="open-webui", leaf_id=None
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
            turns[message_id] = _turn(session, of, message_id, waiting.pop(message_id), turns)
    return turns


def _turn(session: Session, of: Conversation, message_id: str, m: dict[str, Any], turns: dict[str, Turn]) -> Turn:
    found = session.get(Turn, source_id("webui", of.id, message_id))
    if found is None:
        parent = turns[m["parentId"]].id if m.get("parentId") is not None else None
        model = (str(m["model"]), "") if m.get("model") else None
        role = str(m["role"])
        if role not in ("user", "assistant", "system"):
            raise ValueError(f"a message has the role {role[:20]!r}")
        found = Turn(
            id=source_id("webui", of.id, message_id), conversation_id=of.id, parent_id=parent, role=role,
            content=storable(str(m.get("content") or "")), model_id=model_id(session, model), sampling=None,
            finish=None, seconds=None, created=float(m.get("timestamp") or now()),
        )  # fmt: skip
        session.add(found)
        session.flush()
    of.leaf_id = found.id
    if found.role == "user" and not of.title:
        of.title = " ".join(found.content.split())[:80]
    return found


def _thumb(
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
    import_judgement(
        session, done, "thumb", ("webui", turn.id, rater), rater, verdict, "open-webui", when, turn_id=turn.id
    )
    beside = [
        turns[i] for i, m in messages.items()
        if i in turns and i != message_id and m.get("parentId") == messages[message_id].get("parentId")
        and m.get("role") == "assistant" and m.get("model") != messages[message_id].get("model")
    ]  # fmt: skip
    if len(beside) == 1 and said.get("sibling_model_ids") and turn.content.strip() != beside[0].content.strip():
        prompt = _before(turns, turn)
        answers = [TurnText(t.content, _named(messages, turns, t)) for t in (turn, beside[0])]
        item = import_item(session, "open-webui", "compare", prompt, answers, {})
        key, choice = ("webui pair", turn.id, rater), {"choice": 0 if rating == 1 else 1}
        import_judgement(
            session, done, "compare", key, rater, choice, "open-webui", when, item_id=item.id
        )  # fmt: skip


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
