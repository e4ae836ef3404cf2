"""Conversations of several formats -> exchanges: what was asked, what was answered, what the user said next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from steersman.data import Row
from steersman.data import fields as f
from steersman.data.examples import Message
from steersman.data.sources import transcript


@dataclass(slots=True)
class Exchange:
    """The turns before an answer, the answer, and the user's turn after it; `prompt` may hold no user turn."""

    prompt: list[Message]
    answer: str
    reaction: str
    row: Row

    @property
    def last_question(self) -> str:
        """The user's last turn before the answer; empty where there is none."""
        return next((m["content"] for m in reversed(self.prompt) if m["role"] == "user"), "")


def exchanges(row: Row) -> Iterator[Exchange]:
    """Every answer that a user reacted to, in order.

    Understood are `messages`, `conversations`, `turns` with speaker and utterance, trees of messages, dialogues as
    JSON text in `context`, transcripts in `chosen`, and `prompt`, `completion` with `feedback` in words.

    Raises RowError (file, row, field) where the row is none of these or a turn is broken.
    """
    for turns in _conversations(row):
        for i, turn in enumerate(turns[1:], 1):
            if turn["role"] == "user" and turns[i - 1]["role"] == "assistant" and turn["content"].strip():
                yield Exchange(turns[: i - 1], turns[i - 1]["content"], turn["content"], row)


def _conversations(row: Row) -> Iterator[list[Message]]:
    data = row.data
    if "feedback" in data:
        prompt: list[Message] = []
        if isinstance(data.get("prompt"), list):
            prompt = f.turns(row, "prompt", f.listing(row, "prompt"))
        elif f.optional_text(row, "prompt").strip():
            prompt = [{"role": "user", "content": f.text(row, "prompt")}]
        answer, reaction = f.text(row, "completion"), f.text(row, "feedback")
        said: list[Message] = [{"role": "assistant", "content": answer}, {"role": "user", "content": reaction}]
        yield f.with_system(row, [*prompt, *said])
    elif "messages" in data or "conversations" in data:
        column = "messages" if "messages" in data else "conversations"
        yield f.with_system(row, f.turns(row, column, f.listing(row, column)))
    elif "turns" in data:
        yield [_spoken(row, "turns", t) for t in f.listing(row, "turns")]
    elif isinstance(data.get("prompt"), dict):
        yield from _paths(row, data["prompt"], [])
    elif "context" in data:
        yield [_spoken(row, "context", t) for t in f.json_text(row, "context")]
    elif "chosen" in data:
        turns, reply = transcript(row, "chosen")
        yield [*turns, {"role": "assistant", "content": reply}]
    else:
        raise row.fault(
            "no conversation",
            f"the row holds no conversation (it has {', '.join(data)}); expected messages, conversations, turns, a "
            "tree under prompt, context, a transcript under chosen, or prompt, completion and feedback",
        )


def _spoken(row: Row, column: str, item: Any) -> Message:
    roles = {**f.ROLES, "api": "tool"}
    speaker = str(item.get("speaker", item.get("role", ""))).lower() if isinstance(item, dict) else ""
    # in task dialogues the system is who answers
    role = "assistant" if "speaker" in (item or {}) and speaker == "system" else roles.get(speaker)
    if role is None:
        raise row.fault("unknown role", f"a turn has the role {speaker[:40]!r}; known are {', '.join(roles)}", column)
    text = item.get("utterance", item.get("text"))
    return {"role": role, "content": str(text) if text is not None else str(item)}


def _paths(row: Row, node: Any, path: list[Message]) -> Iterator[list[Message]]:
    """From the root to every leaf; what several leaves share comes several times."""
    path = [*path, f.turn(row, "prompt", node, None, len(path))]
    replies = [r for r in node.get("replies") or [] if str(r.get("text") or "").strip()]
    for reply in replies:
        yield from _paths(row, reply, path)
    if not replies:
        yield path
