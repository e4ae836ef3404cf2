"""The tables. Times are seconds since 1970 (UTC); ids that a browser sees are random UUIDs.

Who a rater is stands in `person` and `login` alone; everything else knows a rater by number and pseudonym, so that
a person can be forgotten while the judgements stay. Rows of `judgement` are never changed: a trigger refuses it, and
what is taken back is a new row that names the old one in `undoes`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Double, ForeignKey, Index, UniqueConstraint
from sqlalchemy import String as AnyString
from sqlalchemy import Text as AnyText
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from steersman.people.store.verdicts import storable


class String(TypeDecorator[str]):
    """Text of at most so many characters, as every database takes it: stored and looked for as `storable`."""

    impl = AnyString
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else storable(value)


class Text(String):
    """The same of any length."""

    impl = AnyText
    cache_ok = True


UUID = String(36)
JSON_OR_NULL = JSON(none_as_null=True)
CUT = "length"
"""The `finish` of a text that the limit on its tokens cut; None where nobody knows how it ended."""
HERE = "collect"
"""The `source` of what was said on our own pages."""


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON_OR_NULL, list[Any]: JSON_OR_NULL, float: Double}  # noqa: RUF012


class Rater(Base):
    """Who judges, by pseudonym only."""

    __tablename__ = "rater"
    id: Mapped[int] = mapped_column(primary_key=True)
    pseudonym: Mapped[str] = mapped_column(String(32), unique=True)
    created: Mapped[float]


class Person(Base):
    """Personal data of a rater: deleted on request."""

    __tablename__ = "person"
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    password: Mapped[str | None] = mapped_column(String(200))
    role: Mapped[str] = mapped_column(String(10))
    created: Mapped[float]


class Forgotten(Base):
    """How the next import knows a rater again whose name is gone: by a slow digest of it, under the store's salt."""

    __tablename__ = "forgotten"
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"), primary_key=True)
    salt: Mapped[str] = mapped_column(String(32))
    digest: Mapped[str] = mapped_column(String(64))


class Login(Base):
    """A browser's session, by the hash of its token."""

    __tablename__ = "login"
    token: Mapped[str] = mapped_column(String(64), primary_key=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"), index=True)
    csrf: Mapped[str] = mapped_column(String(64))
    created: Mapped[float]
    expires: Mapped[float]


class Model(Base):
    """A model that answered: its name and the version of its weights."""

    __tablename__ = "model"
    __table_args__ = (UniqueConstraint("name", "version"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(300))
    version: Mapped[str] = mapped_column(String(100))


class Conversation(Base):
    """A chat of one rater; its turns are a tree, in which a new answer or an edited turn is a sibling.

    `leaf_id` is the last turn of the path that is shown.
    """

    __tablename__ = "conversation"
    id: Mapped[str] = mapped_column(UUID, primary_key=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"), index=True)
    created: Mapped[float]
    title: Mapped[str] = mapped_column(String(200))
    source: Mapped[str] = mapped_column(String(300))
    leaf_id: Mapped[str | None] = mapped_column(UUID)


class Turn(Base):
    """One message: of the user, or of a model under sampling settings."""

    __tablename__ = "turn"
    id: Mapped[str] = mapped_column(UUID, primary_key=True)
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversation.id"), index=True)
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("turn.id"))
    role: Mapped[str] = mapped_column(String(20))
    content: Mapped[str] = mapped_column(Text)
    model_id: Mapped[int | None] = mapped_column(ForeignKey("model.id"))
    sampling: Mapped[dict[str, Any] | None]
    finish: Mapped[str | None] = mapped_column(String(20))
    seconds: Mapped[float | None]
    created: Mapped[float]


class Queue(Base):
    """Items of one task, to be judged by `overlap` raters each; one of every `gold_every` items of a rater has a
    known verdict. `settings` holds what the task asks (attributes, labels, instructions)."""

    __tablename__ = "queue"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    task: Mapped[str] = mapped_column(String(20))
    overlap: Mapped[int]
    gold_every: Mapped[int]
    settings: Mapped[dict[str, Any]]
    created: Mapped[float]


class Item(Base):
    """A prompt with answers to be judged; `gold` is the verdict that is known to be right."""

    __tablename__ = "item"
    __table_args__ = (UniqueConstraint("queue_id", "digest"), Index("item_place", "queue_id", "position"))
    id: Mapped[str] = mapped_column(UUID, primary_key=True)
    queue_id: Mapped[int] = mapped_column(ForeignKey("queue.id"))
    position: Mapped[int]
    prompt: Mapped[Any] = mapped_column(JSON_OR_NULL, nullable=False)  # text, or a list of messages
    gold: Mapped[dict[str, Any] | None]
    digest: Mapped[str] = mapped_column(String(64))
    source: Mapped[str] = mapped_column(String(300))
    conversation_id: Mapped[str | None] = mapped_column(ForeignKey("conversation.id"))


class Answer(Base):
    """One answer of an item, numbered from 0."""

    __tablename__ = "answer"
    __table_args__ = (UniqueConstraint("item_id", "number"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[str] = mapped_column(ForeignKey("item.id"), index=True)
    number: Mapped[int]
    content: Mapped[str] = mapped_column(Text)
    model_id: Mapped[int | None] = mapped_column(ForeignKey("model.id"))
    sampling: Mapped[dict[str, Any] | None]
    finish: Mapped[str | None] = mapped_column(String(20))
    seconds: Mapped[float | None]


class Assignment(Base):
    """An item that a rater was shown, with its answers in the order `sides`; `state` is open, judged or skipped."""

    __tablename__ = "assignment"
    __table_args__ = (UniqueConstraint("item_id", "rater_id"), Index("assignment_state", "rater_id", "state"))
    id: Mapped[str] = mapped_column(UUID, primary_key=True)
    item_id: Mapped[str] = mapped_column(ForeignKey("item.id"), index=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"))
    sides: Mapped[list[Any]]
    state: Mapped[str] = mapped_column(String(10))
    created: Mapped[float]


class JudgementRow(Base):
    """What a rater said of an item's answers or of a turn; append-only.

    `key` is a UUID of the client's making: a request that is sent again is stored once. `sides` is the order in which
    the answers were shown, `seconds` the time from the first look to the verdict, `undoes` the row that this one
    takes back.
    """

    __tablename__ = "judgement"
    __table_args__ = (Index("judgement_of_rater", "rater_id", "created"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(UUID, unique=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"))
    task: Mapped[str] = mapped_column(String(20))
    item_id: Mapped[str | None] = mapped_column(ForeignKey("item.id"), index=True)
    turn_id: Mapped[str | None] = mapped_column(ForeignKey("turn.id"), index=True)
    verdict: Mapped[dict[str, Any]]
    sides: Mapped[list[Any] | None]
    seconds: Mapped[float | None]
    created: Mapped[float]
    undoes: Mapped[int | None] = mapped_column(ForeignKey("judgement.id"), unique=True)
    source: Mapped[str] = mapped_column(String(300))
