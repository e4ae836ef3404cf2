"""Open WebUI's "Export All Chats" and "Export feedback": chats, their thumbs, and comparisons of two models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from steersman.people.store.conversations import TurnText, model_id
from steersman.people.store.database import IMPORTING, Store, now, pieces, take_turns
from steersman.people.store.imported import EMPTY, SAME, ImportCounts, Told, source_id, told_of_item, told_time
from steersman.people.store.open_webui_text import read_message
from steersman.people.store.raters import imported_name, imported_rater
from steersman.people.store.schema import Conversation, Turn
from steersman.people.store.verdicts import checked, storable

CHATS = 50
"""Chats that are stored in one transaction."""
NO_CONVERSATION = "no conversation in the record"
ROLES = ("user", "assistant", "system")
THUMBS = {1: True, -1: False, "1": True, "-1": False}
"""Open WebUI takes a rating as a number or as a text."""


@dataclass(frozen=True, slots=True)
class ToldTurn:
    """A message under its id in the store; `more` says why a judgement of it is none of its text alone, which may be
    for a message before it, or is empty."""

    id: str
    parent_id: str | None
    role: str
    content: str
    model: tuple[str, str] | None
    created: float
    more: str


@dataclass(slots=True)
class ToldChat:
    """A chat as the export has it, and what was said of it.

    Messages stand by their ids there, with the ids of those that answer each of them (None: that begin) and, of those
    that hang on the chat, what is stored.
    """

    id: str
    who: str
    messages: dict[str, Any]
    answering: dict[str | None, list[str]]
    turns: dict[str, ToldTurn]
    told: list[Told] = field(default_factory=list)


def is_open_webui(record: dict[str, Any]) -> bool:
    """Whether a record is a chat or a feedback, with a conversation or without one."""
    chat = record.get("chat")
    is_chat = isinstance(chat, dict) and ("history" in chat or "user_id" in record)
    return is_chat or {"snapshot", "meta", "data"} <= record.keys()


def _history(record: dict[str, Any]) -> dict[str, Any] | None:
    """The tree of messages of a chat, or of the chat at the time of a feedback."""
    snapshot = record.get("snapshot")
    chat = (snapshot.get("chat") or {}).get("chat") if isinstance(snapshot, dict) else record.get("chat")
    history = chat.get("history") if isinstance(chat, dict) else None
    messages = history.get("messages") if isinstance(history, dict) else None
    return messages if isinstance(messages, dict) else None


def read_record(record: dict[str, Any], as_of: float, done: ImportCounts) -> ToldChat | None:
    """A chat with its thumbs, or a feedback with the chat that it is about; None, counted, where there is none.

    `as_of` is when the file was written; a record that says when it was changed last goes by that.
    """
    messages = _history(record)
    if messages is None:
        done.left_out[NO_CONVERSATION] += 1
        return None
    is_feedback = "snapshot" in record
    chat_id = str((record.get("meta") or {}).get("chat_id") or record["id"]) if is_feedback else str(record["id"])
    as_of = _time(record.get("updated_at"), as_of)
    chat = _chat(source_id("webui", chat_id), str(record.get("user_id") or "unknown"), messages, done)
    if is_feedback:
        _read_thumb(chat, str(record["meta"]["message_id"]), record["data"], done, when=as_of, as_of=as_of)
        return chat
    for message_id, message in messages.items():
        if isinstance(message.get("annotation"), dict):
            when = _time(message.get("timestamp"), as_of)
            _read_thumb(chat, message_id, message["annotation"], done, when=when, as_of=as_of)
    return chat


def _chat(chat_id: str, user: str, messages: dict[str, Any], done: ImportCounts) -> ToldChat:
    """The chat, level by level; what hangs on a message that is not there, is of no role that the store has, or hangs
    on itself, is left out."""
    answering: dict[str | None, list[str]] = {}
    for message_id, message in messages.items():
        answering.setdefault(message.get("parentId"), []).append(message_id)
    place = {message_id: i for i, message_id in enumerate(messages)}
    turns: dict[str, ToldTurn] = {}
    level = answering.get(None, [])
    while level:
        for message_id in level:
            if messages[message_id].get("role") in ROLES:
                turns[message_id] = _turn(chat_id, message_id, messages[message_id], turns)
            else:
                done.left_out[f"a message of another role than {', '.join(ROLES)}"] += 1
        kept = (above for above in level if above in turns)
        level = sorted((i for above in kept for i in answering.get(above, ())), key=place.__getitem__)
    return ToldChat(chat_id, imported_name("open-webui", user), messages, answering, turns)


def _turn(chat_id: str, message_id: str, m: dict[str, Any], turns: dict[str, ToldTurn]) -> ToldTurn:
    parent = None if m.get("parentId") is None else turns[m["parentId"]]
    text, more = read_message(m)
    return ToldTurn(
        source_id("webui", chat_id, message_id), None if parent is None else parent.id, m["role"], storable(text),
        _model(m), _time(m.get("timestamp"), now()), more if parent is None else parent.more or more,
    )  # fmt: skip


def _time(got: Any, otherwise: float) -> float:
    return told_time(float(got)) if got else otherwise


def store_chats(store: Store, chats: list[ToldChat]) -> None:
    """Stores the conversations, and of those that are there already the turns that are new."""
    for piece in pieces(chats, CHATS):
        with store.begin() as session:
            take_turns(session.connection(), IMPORTING)
            for chat in piece:
                _store_chat(session, chat)


def _store_chat(session: Session, chat: ToldChat) -> None:
    of = session.get(Conversation, chat.id)
    if of is None:
        of = Conversation(
            id=chat.id, rater_id=imported_rater(session, chat.who), created=now(), title="", source="open-webui",
            leaf_id=None,
        )  # fmt: skip
        session.add(of)
        session.flush()
    known = set(session.scalars(select(Turn.id).where(Turn.conversation_id == chat.id)))
    for one in chat.turns.values():
        if one.id not in known:
            turn = Turn(
                id=one.id, conversation_id=chat.id, parent_id=one.parent_id, role=one.role, content=one.content,
                model_id=model_id(session, one.model), sampling=None, finish=None, seconds=None, created=one.created,
            )  # fmt: skip
            session.add(turn)
        of.leaf_id = one.id
        if one.role == "user" and not of.title:
            of.title = " ".join(one.content.split())[:80]
    session.flush()


def _model(message: dict[str, Any]) -> tuple[str, str] | None:
    """Name and version, which is not known, of the model that wrote a message; None for a person.

    In the arena `model` is the arena's name, and `selectedModelId` the model that it drew.
    """
    name = message.get("selectedModelId") or message.get("model")
    return (str(name), "") if name else None


def _read_thumb(
    chat: ToldChat, message_id: str, said: dict[str, Any], done: ImportCounts, *, when: float, as_of: float
) -> None:
    """A thumb; where the same question was answered by another model beside it, a comparison, too."""
    up, turns, messages = THUMBS.get(said.get("rating", 0)), chat.turns, chat.messages
    if up is None or message_id not in turns:
        done.left_out["no thumb" if up is None else "the message is not in the conversation"] += 1
        return
    turn = turns[message_id]
    if turn.more or not turn.content.strip():
        done.left_out[turn.more or EMPTY] += 1
        return
    reasons = [str(r) for r in (said.get("reason"), said.get("comment")) if r]
    verdict = checked("thumb", {"up": up, "reasons": reasons}, [turn.content], {})
    about: dict[str, Any] = {"who": chat.who, "source": "open-webui", "when": when, "as_of": as_of}
    chat.told.append(Told(task="thumb", verdict=verdict, turn_id=turn.id, **about))
    if not said.get("sibling_model_ids"):
        return
    beside = [
        i for i in chat.answering[messages[message_id].get("parentId")]
        if i != message_id and messages[i].get("role") == "assistant"
        and _model(messages[i]) != _model(messages[message_id])
    ]  # fmt: skip
    odd = _no_comparison(turn, [turns[i] for i in beside])
    if odd:
        done.left_out[odd] += 1
        return
    answers = [TurnText(turns[i].content, _model(messages[i])) for i in (message_id, beside[0])]
    before = _before(chat, message_id)
    choice = {"choice": 0 if up else 1}
    chat.told.append(told_of_item("open-webui", "compare", before, answers, choice, settings={}, **about))


def _no_comparison(turn: ToldTurn, beside: list[ToldTurn]) -> str:
    """Why an answer and those of other models beside it are no comparison of two texts; empty where they are one."""
    if len(beside) != 1:
        return f"a comparison with {'several other answers' if beside else 'no other answer in the conversation'}"
    if beside[0].more or not beside[0].content.strip():
        return beside[0].more or EMPTY
    return SAME if turn.content.strip() == beside[0].content.strip() else ""


def _before(chat: ToldChat, message_id: str) -> list[dict[str, str]]:
    out, at = [], chat.messages[message_id].get("parentId")
    while at is not None:
        out.append({"role": chat.turns[at].role, "content": chat.turns[at].content})
        at = chat.messages[at].get("parentId")
    return out[::-1]
