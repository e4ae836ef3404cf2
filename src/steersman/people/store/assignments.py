"""Who is shown which item, and how far raters are with their queues."""

from __future__ import annotations

import math
import random
import secrets
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Select, and_, func, or_, select
from sqlalchemy.orm import Session

from steersman.people.store.database import new_id, now
from steersman.people.store.items import CHAT, asking_queues
from steersman.people.store.schema import Answer, Assignment, Item, JudgementRow, Queue

HELD_SECONDS = 3600.0
"""How long an open item is kept for the rater who saw it; then another one may have it, too."""
_shuffle = random.SystemRandom().shuffle


@dataclass(slots=True)
class ShownItem:
    """An item as one rater sees it; `answers` in the order of the item, `sides` in that of the screen."""

    assignment: Assignment
    item: Item
    queue: Queue
    answers: list[Answer] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [a.content for a in self.answers]

    @property
    def sides(self) -> list[Answer]:
        return [self.answers[number] for number in self.assignment.sides]


def next_item(session: Session, queue_id: int, rater_id: int) -> ShownItem | None:
    """What the rater judges next: what they left open, a gold item where the draw says so, or else the first item of
    the queue that they have not seen and that too few others have; None where the queue has nothing left for them.

    Of every `gold_every` items of a rater one is gold, at a place that is drawn on the way, so that nobody foresees
    it.
    """
    queue = held_queue(session, queue_id)  # before looking at what is open: another tab of the rater may be taking
    left_open = session.scalar(
        select(Assignment)
        .join(Item, Item.id == Assignment.item_id)
        .where(Item.queue_id == queue_id, Assignment.rater_id == rater_id, Assignment.state == "open")
        .order_by(Assignment.created, Assignment.id)
        .limit(1)
    )
    if left_open is not None:
        return shown_item(session, left_open)
    item = session.scalar(_wanted(queue, rater_id))
    places = _places_for_gold(session, queue, rater_id)
    if places == 1 or (item is not None and places and not secrets.randbelow(places)):
        item = session.scalar(_unseen(queue_id, rater_id).where(Item.gold.is_not(None)).limit(1)) or item
    return None if item is None else assign(session, item, rater_id)


def held_queue(session: Session, queue_id: int) -> Queue:
    """The queue, held until the transaction ends by whoever takes from it or gives back: on SQLite, where one writes
    at a time, by the transaction itself, on PostgreSQL by a lock on its row."""
    return session.get_one(Queue, queue_id, with_for_update=True)


def has_place(session: Session, item: Item) -> bool:
    """Whether fewer raters than the queue asks for judged an item or hold it open; gold items are for everybody.

    The caller holds the queue (`held_queue`).
    """
    overlap = session.get_one(Queue, item.queue_id).overlap
    return item.gold is not None or (session.scalar(select(_taken()).where(Item.id == item.id)) or 0) < overlap


def assign(session: Session, item: Item, rater_id: int) -> ShownItem:
    """Shows an item to a rater, its answers in a random order that is written down."""
    answers = answers_of(session, item.id)
    sides = [a.number for a in answers]
    _shuffle(sides)
    made = Assignment(id=new_id(), item_id=item.id, rater_id=rater_id, sides=sides, state="open", created=now())
    session.add(made)
    session.flush()
    return ShownItem(made, item, session.get_one(Queue, item.queue_id), answers)


def shown_item(session: Session, assignment: Assignment) -> ShownItem:
    """An assignment with all that belongs to it."""
    item = session.get_one(Item, assignment.item_id)
    return ShownItem(assignment, item, session.get_one(Queue, item.queue_id), answers_of(session, item.id))


def own_assignment(session: Session, assignment_id: str, rater_id: int, *, lock: bool = False) -> Assignment | None:
    """The assignment, where it is the rater's own."""
    found = session.get(Assignment, assignment_id, with_for_update=lock)
    return found if found is not None and found.rater_id == rater_id else None


def answers_of(session: Session, item_id: str) -> list[Answer]:
    return list(session.scalars(select(Answer).where(Answer.item_id == item_id).order_by(Answer.number)))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rater is with a queue: verdicts given, how many there can be at most, and whether any are left to
    give. All count gold items like others, so that no number on a page tells them apart."""

    given: int
    most: int
    is_open: bool


def progress(session: Session, queue: Queue, rater_id: int) -> Progress:
    given = session.scalar(_seen(queue.id, rater_id).where(Assignment.state == "judged")) or 0
    left_open = session.scalar(_seen(queue.id, rater_id).where(Assignment.state == "open"))
    is_open = bool(left_open) or session.scalar(_wanted(queue, rater_id)) is not None
    return Progress(given, _most(session, queue), is_open)


def place_of(session: Session, queue: Queue, rater_id: int) -> tuple[int, int] | None:
    """Which item of a queue a rater is at, counted from 1, and how many there can be at most; None for comparisons in
    chats."""
    if queue.name == CHAT:
        return None
    return max(session.scalar(_seen(queue.id, rater_id)) or 0, 1), _most(session, queue)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many verdicts a queue's items want of all raters together, and have; gold items left out."""

    queue: str
    given: int
    wanted: int


def coverage(session: Session) -> list[Coverage]:
    """Of every queue that asks for verdicts."""
    found = []
    for queue in session.scalars(asking_queues()).all():
        judged = (
            select(func.count())
            .select_from(Assignment)
            .join(Item, Item.id == Assignment.item_id)
            .where(Item.queue_id == queue.id, Item.gold.is_(None), Assignment.state == "judged")
        )
        wanted = _items(session, queue, Item.gold.is_(None)) * queue.overlap
        found.append(Coverage(queue.name, session.scalar(judged) or 0, wanted))
    return found


def _most(session: Session, queue: Queue) -> int:
    """How many items of a queue one rater can meet."""
    plain, gold = (_items(session, queue, kind) for kind in (Item.gold.is_(None), Item.gold.is_not(None)))
    if queue.gold_every > 1:
        gold = min(gold, math.ceil(plain / (queue.gold_every - 1)))
    return plain + (gold if queue.gold_every else 0)


def _items(session: Session, queue: Queue, kind: Any) -> int:
    """How many items of a kind a queue has."""
    return session.scalar(select(func.count()).select_from(Item).where(Item.queue_id == queue.id, kind)) or 0


def _places_for_gold(session: Session, queue: Queue, rater_id: int) -> int:
    """Among how many places, the next one and those behind it, that of the gold item of the rater's current
    `gold_every` items is drawn; 0 where it has been there."""
    if not queue.gold_every:
        return 0
    before = (session.scalar(_seen(queue.id, rater_id)) or 0) % queue.gold_every
    latest = (
        select(Item.gold.is_not(None))
        .join(Assignment, Assignment.item_id == Item.id)
        .where(Item.queue_id == queue.id, Assignment.rater_id == rater_id)
        .order_by(Assignment.created.desc())
        .limit(before)
    )
    return 0 if any(session.scalars(latest)) else queue.gold_every - before


def _seen(queue_id: int, rater_id: int) -> Select[Any]:
    """How many items of a queue a rater was shown."""
    joined = select(func.count()).select_from(Assignment).join(Item, Item.id == Assignment.item_id)
    return joined.where(Item.queue_id == queue_id, Assignment.rater_id == rater_id)


def _wanted(queue: Queue, rater_id: int) -> Select[Any]:
    """The first item without a gold verdict that the rater has not seen and that too few others have."""
    return _unseen(queue.id, rater_id).where(Item.gold.is_(None), _taken() < queue.overlap).limit(1)


def _unseen(queue_id: int, rater_id: int) -> Select[Any]:
    mine = select(Assignment.id).where(Assignment.item_id == Item.id, Assignment.rater_id == rater_id)
    return (
        select(Item)
        .where(Item.queue_id == queue_id, Item.conversation_id.is_(None), ~mine.exists())
        .order_by(Item.position)
    )


def _taken() -> Any:
    """How many raters judged an item, or have it open and were shown it, or took a verdict on it back, not too long
    ago."""
    since = now() - HELD_SECONDS
    taken_back = select(JudgementRow.id).where(
        JudgementRow.item_id == Assignment.item_id,
        JudgementRow.rater_id == Assignment.rater_id,
        JudgementRow.undoes.is_not(None),
        JudgementRow.created > since,
    )
    counts = or_(
        Assignment.state == "judged",
        and_(Assignment.state == "open", or_(Assignment.created > since, taken_back.exists())),
    )
    return select(func.count()).select_from(Assignment).where(Assignment.item_id == Item.id, counts).scalar_subquery()
