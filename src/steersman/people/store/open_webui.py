"""Open WebUI's "Export All Chats" and "Export feedback": chats, their thumbs, and comparisons of two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from steersman.people.store.conversations import TurnText, model_id
from steersman.people.store.database import now
from steersman.people.store.imported import ImportCounts, import_item, import_judgement, source_id
from steersman.people.store.raters import imported_rater
from steersman.people.store.schema import Conversation, Turn
from steersman.people.store.verdicts import checked, storable


@dataclass(slots=True)
class _Chat:
    """A chat's messages by id, the ids of those that answer each of them (None: that begin), and what is stored."""

    messages: dict[str, Any]
    answering: dict[str | None, list[str]]
    turns: dict[str, Turn]


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
    chat = _stored(session, chat_id, rater, messages)
    if is_feedback:
        message_id, said = str(record["meta"]["message_id"]), record["data"]
        _thumb(session, chat, message_id, said, rater, done, _when(record))
        return
    for message_id, message in messages.items():
        if isinstance(message.get("annotation"), dict):
            when = float(message.get("timestamp") or now())
            _thumb(session, chat, message_id, message["annotation"], rater, done, when)


def _stored(session: Session, chat_id: str, rater: int, messages: dict[str, Any]) -> _Chat:
    """Stores a chat's messages, level by level; what hangs on a message that is not there, or on itself, is not."""
    of = session.get(Conversation, source_id("webui", chat_id))
    if of is None:
        of = Conversation(
            id=source_id("webui", chat_id), rater_id=rater, created=now(), title="", source="open-webui", leaf_id=None
        )
        session.add(of)
        session.flush()
    answering: dict[str | None, list[str]] = {}
    for message_id, message in messages.items():
        answering.setdefault(message.get("parentId"), []).append(message_id)
    place = {message_id: i for i, message_id in enumerate(messages)}
    turns: dict[str, Turn] = {}
    level = answering.get(None, [])
    while level:
        for message_id in level:
            turns[message_id] = _turn(session, of, message_id, messages[message_id], turns)
        level = sorted((i for above in level for i in answering.get(above, ())), key=place.__getitem__)
    return _Chat(messages, answering, turns)


def _turn(session: Session, of: Conversation, message_id: str, m: dict[str, Any], turns: dict[str, Turn]) -> Turn:
    found = session.get(Turn, source_id("webui", of.id, message_id))
    if found is None:
        parent = turns[m["parentId"]].id if m.get("parentId") is not None else None
        role = str(m["role"])
        if role not in ("user", "assistant", "system"):
            raise ValueError(f"a message has the role {role[:20]!r}")
        found = Turn(
            id=source_id("webui", of.id, message_id), conversation_id=of.id, parent_id=parent, role=role,
            content=storable(str(m.get("content") or "")), model_id=model_id(session, _model(m)), sampling=None,
            finish=None, seconds=None, created=float(m.get("timestamp") or now()),
        )  # fmt: skip
        session.add(found)
        session.flush()
    of.leaf_id = found.id
    if found.role == "user" and not of.title:
        of.title = " ".join(found.content.split())[:80]
    return found


def _model(message: dict[str, Any]) -> tuple[str, str] | None:
    """Name and version, which is not known, of the model that wrote a message; None for a person.

    In the arena `model` is the arena's name, and `selectedModelId` the model that it drew.
    """
    name = message.get("selectedModelId") or message.get("model")
    return (str(name), "") if name else None


def _thumb(
    session: Session,
    chat: _Chat,
    message_id: str,
    said: dict[str, Any],
    rater: int,
    done: ImportCounts,
    when: float,
) -> None:
    """A thumb; where the same question was answered by another model beside it, a comparison, too."""
    rating = said.get("rating")
    turns, messages = chat.turns, chat.messages
    if rating not in (1, -1) or message_id not in turns:
        done.left_out["no thumb" if rating not in (1, -1) else "the message is not in the conversation"] += 1
        return
    turn = turns[message_id]
    reasons = [str(r) for r in (said.get("reason"), said.get("comment")) if r]
    verdict = checked("thumb", {"up": rating == 1, "reasons": reasons}, [turn.content], {})
    import_judgement(
        session, done, "thumb", ("webui", turn.id, rater), rater, verdict, "open-webui", when, turn_id=turn.id
    )
    if not said.get("sibling_model_ids"):
        return
    beside = [
        i for i in chat.answering[messages[message_id].get("parentId")]
        if i != message_id and messages[i].get("role") == "assistant"
        and _model(messages[i]) != _model(messages[message_id])
    ]  # fmt: skip
    if len(beside) == 1 and turn.content.strip() != turns[beside[0]].content.strip():
        answers = [TurnText(turns[i].content, _model(messages[i])) for i in (message_id, beside[0])]
        item = import_item(session, "open-webui", "compare", _before(chat, message_id), answers, {})
        key, choice = ("webui pair", turn.id, rater), {"choice": 0 if rating == 1 else 1}
        import_judgement(
            session, done, "compare", key, rater, choice, "open-webui", when, item_id=item.id
        )  # fmt: skip


def _before(chat: _Chat, message_id: str) -> list[dict[str, str]]:
    out, at = [], chat.messages[message_id].get("parentId")
    while at is not None:
        out.append({"role": chat.turns[at].role, "content": chat.turns[at].content})
        at = chat.messages[at].get("parentId")
    return out[::-1]


def _when(record: dict[str, Any]) -> float:
    return float(record.get("created_at") or now())
