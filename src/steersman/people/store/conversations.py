"""Chats: trees of turns, of which one path is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from steersman.people.store.database import found_or_made, new_id, now
from steersman.people.store.schema import HERE, Conversation, Model, Turn
from steersman.people.store.verdicts import storable


@dataclass(frozen=True, slots=True)
class TurnText:
    """A text and how it came about: by which model, with which settings; all None for what a person wrote."""

    content: str
    model: tuple[str, str] | None = None
    sampling: dict[str, Any] | None = None
    finish: str | None = None
    seconds: float | None = None


def start(session: Session, rater_id: int, *, system: str = "") -> Conversation:
    """A new conversation on our own pages, with a system turn where there is a prompt for one."""
    made = Conversation(id=new_id(), rater_id=rater_id, created=now(), title="", source=HERE, leaf_id=None)
    session.add(made)
    session.flush()
    if system:
        add_turn(session, made, "system", TurnText(system))
    return made


def add_turn(
    session: Session, of: Conversation, role: str, said: TurnText, parent_id: str | None = None, *,
    turn_id: str | None = None,
) -> Turn:  # fmt: skip
    """A turn behind `parent_id` (or the shown path's last one), which becomes the last one that is shown; under
    `turn_id`, or an id that is made here."""
    turn = Turn(
        id=turn_id or new_id(), conversation_id=of.id, parent_id=parent_id or of.leaf_id, role=role,
        content=storable(said.content), model_id=model_id(session, said.model), sampling=said.sampling,
        finish=said.finish, seconds=said.seconds, created=now(),
    )  # fmt: skip
    session.add(turn)
    session.flush()
    of.leaf_id = turn.id
    if role == "user" and not of.title:
        of.title = " ".join(turn.content.split())[:80]
    return turn


def branch(
    session: Session, of: Conversation, turn: Turn, role: str, said: TurnText, *, turn_id: str | None = None
) -> Turn:
    """A sibling of `turn`: another answer, or an edited turn, from which the conversation goes on; its id as in
    `add_turn`."""
    made = add_turn(session, of, role, said, turn.parent_id, turn_id=turn_id)
    made.parent_id = turn.parent_id  # also where the turn is the first one
    return made


def path(session: Session, of: Conversation) -> list[Turn]:
    """The shown turns, the first one first."""
    return path_to(all_turns(session, of.id), of.leaf_id)


def path_to(turns: dict[str, Turn], leaf_id: str | None) -> list[Turn]:
    """The turns from the root to `leaf_id`."""
    out = []
    while leaf_id is not None:
        out.append(turns[leaf_id])
        leaf_id = turns[leaf_id].parent_id
    return out[::-1]


def all_turns(session: Session, conversation_id: str) -> dict[str, Turn]:
    """Every turn of a conversation by id, those of other branches too, the oldest first."""
    found = session.scalars(
        select(Turn).where(Turn.conversation_id == conversation_id).order_by(Turn.created, Turn.id)
    )
    return {turn.id: turn for turn in found}


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    """Turns as a model reads them."""
    return [{"role": t.role, "content": t.content} for t in turns]


def model_id(session: Session, model: tuple[str, str] | None) -> int | None:
    """The number of a (name, version), which is written down at its first answer."""
    if model is None:
        return None
    name, version = model[0][:300], model[1][:100]
    known = select(Model).where(Model.name == name, Model.version == version)

    def make() -> Model:
        made = Model(name=name, version=version)
        session.add(made)
        return made

    return found_or_made(session, lambda: session.scalar(known), make)[0].id
