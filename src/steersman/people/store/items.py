"""Queues and their items, as they are stored and revised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, insert, select
from sqlalchemy.orm import Session

from steersman.people.store.conversations import TurnText, model_id
from steersman.people.store.database import found_or_made, new_id, now
from steersman.people.store.schema import Answer, Item, Queue
from steersman.people.store.verdicts import TASKS, checked, storable
from steersman.types import SteersmanError

LONGEST_NAME = 100
"""Characters of a queue's name."""
CHAT = "chat"
"""The queue of comparisons that come up in chats; its items are their rater's alone."""
ANSWERS = {"compare": (2, 2), "rank": (2, 26), "rate": (1, 1), "mark": (1, 1), "review": (1, 1)}
"""Fewest and most answers of an item."""


@dataclass(frozen=True, slots=True)
class NewItem:
    """An item before it is stored; `prompt` is text or a list of messages. Without an `id` it gets one."""

    prompt: Any
    answers: list[TurnText]
    gold: dict[str, Any] | None = None
    source: str = ""
    id: str = ""

    @property
    def digest(self) -> str:
        """What an item and its double have in common; the last field is that of a conversation."""
        texts = [storable(a.content) for a in self.answers]
        return hashlib.sha256(json.dumps([self.prompt, texts, ""], ensure_ascii=True).encode()).hexdigest()


def make_queue(
    session: Session, name: str, task: str, *, overlap: int = 1, gold_every: int = 0, **settings: Any
) -> Queue:
    """The queue of this name, new or with its settings as they now are.

    Raises SteersmanError as `check_queue`, and for another task than before.
    """
    check_queue(name, task, settings)

    def make() -> Queue:
        made = Queue(name=name, task=task, overlap=overlap, gold_every=gold_every, settings=settings, created=now())
        session.add(made)
        return made

    found, _ = found_or_made(session, lambda: session.scalar(select(Queue).where(Queue.name == name)), make)
    if found.task != task:
        raise SteersmanError(f"queue {name}: the store has it as a queue of {found.task}, not {task}; name another")
    found.overlap, found.gold_every, found.settings = overlap, gold_every, settings
    session.flush()
    return found


def check_queue(name: str, task: str, settings: dict[str, Any]) -> None:
    """Raises SteersmanError for a name that no store takes, an unknown task, and one without the settings that it
    needs."""
    if not 0 < len(name) <= LONGEST_NAME or storable(name) != name:
        raise SteersmanError(
            f"queue {name[:120]!r}: a queue's name has 1 to {LONGEST_NAME} characters that a database takes"
        )
    if task not in TASKS:
        raise SteersmanError(f"queue {name}: the task {task!r} is none of {', '.join(TASKS)}")
    for needs, key in (("rate", "attributes"), ("mark", "labels")):
        if task == needs and not settings.get(key):
            raise SteersmanError(f"queue {name}: the task {task} needs {key}")


def add_item(session: Session, queue: Queue, new: NewItem, *, conversation_id: str | None = None) -> Item | None:
    """Stores an item; None where the queue has the same prompt and answers already.

    An item of a conversation is always new. Raises SteersmanError as `check_item`.
    """
    return next(iter(add_items(session, queue, [new], conversation_id=conversation_id)), None)


def add_items(
    session: Session, queue: Queue, new: Sequence[NewItem], *, conversation_id: str | None = None
) -> list[Item]:
    """Stores those of the items, in their order, that the queue does not have yet; the others cost no statement.

    Processes that add to one queue take turns. Raises SteersmanError as `check_item`.
    """
    in_chat = conversation_id is not None
    golds = [check_item(queue.name, queue.task, one, queue.settings, in_chat=in_chat) for one in new]
    session.get_one(Queue, queue.id, with_for_update=True)
    digests = [new_id().replace("-", "") if in_chat else one.digest for one in new]
    known = set(session.scalars(select(Item.digest).where(Item.queue_id == queue.id, Item.digest.in_(digests))))
    fresh: dict[str, tuple[NewItem, dict[str, Any] | None]] = {}
    for one, gold, digest in zip(new, golds, digests, strict=True):
        if digest not in known:
            fresh.setdefault(digest, (one, gold))
    if not fresh:
        return []
    last = session.scalar(select(func.max(Item.position)).where(Item.queue_id == queue.id))
    items = [
        Item(
            id=one.id or new_id(), queue_id=queue.id, position=place, prompt=one.prompt, gold=gold, digest=digest,
            source=one.source[:300], conversation_id=conversation_id,
        )
        for place, (digest, (one, gold)) in enumerate(fresh.items(), 0 if last is None else last + 1)
    ]  # fmt: skip
    session.add_all(items)
    session.flush()
    models = _model_ids(session, [one for one, _ in fresh.values()])
    rows = [
        {
            "item_id": item.id, "number": number, "content": storable(one.content), "model_id": models[one.model],
            "sampling": one.sampling, "finish": one.finish, "seconds": one.seconds,
        }
        for item, (new_item, _) in zip(items, fresh.values(), strict=True)
        for number, one in enumerate(new_item.answers)
    ]  # fmt: skip
    session.execute(insert(Answer), rows)
    return items


def revise_items(session: Session, queue: Queue, told: Sequence[NewItem]) -> int:
    """Gives those of the items that the queue has already the gold verdict, and their answers the models and the
    `finish`, that are told of them now; returns of how many something is another one. Raises SteersmanError as
    `check_item`."""
    session.get_one(Queue, queue.id, with_for_update=True)
    new = {one.digest: one for one in reversed(told)}  # of two of one digest the first counts, as in `add_items`
    known = session.scalars(select(Item).where(Item.queue_id == queue.id, Item.digest.in_(new))).all()
    by_id = {item.id: item for item in known}
    models = _model_ids(session, [new[item.digest] for item in known])
    revised = set[str]()
    for item in known:
        gold = check_item(queue.name, queue.task, new[item.digest], queue.settings)
        if gold != item.gold:
            item.gold = gold
            revised.add(item.id)
    for answer in session.scalars(select(Answer).where(Answer.item_id.in_(by_id))):
        now_told = new[by_id[answer.item_id].digest].answers[answer.number]
        model, finish = models[now_told.model], now_told.finish
        if (model, finish) != (answer.model_id, answer.finish):
            answer.model_id, answer.finish = model, finish
            revised.add(answer.item_id)
    session.flush()
    return len(revised)


def _model_ids(session: Session, items: Sequence[NewItem]) -> dict[tuple[str, str] | None, int | None]:
    """The number of each model that answered."""
    return {model: model_id(session, model) for model in dict.fromkeys(a.model for one in items for a in one.answers)}


def check_item(
    queue: str, task: str, new: NewItem, settings: dict[str, Any], *, in_chat: bool = False
) -> dict[str, Any] | None:
    """The gold verdict of an item, if any, in its plain form.

    Raises SteersmanError for a number of answers that the task does not take, an empty or twofold one (which come up
    in chats), and a gold verdict that is none.
    """
    fewest, most = ANSWERS[task]
    texts = [storable(a.content) for a in new.answers]
    where = f"queue {queue}{', ' + new.source if new.source else ''}"
    if not fewest <= len(texts) <= most:
        span = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        raise SteersmanError(f"{where}: the task {task} takes {span} answers, not {len(texts)}")
    if any(not t.strip() for t in texts) and not in_chat:
        raise SteersmanError(f"{where}: an answer is empty")
    if len(set(texts)) < len(texts) and not in_chat:
        raise SteersmanError(f"{where}: two answers are the same text, so there is nothing to compare")
    try:
        gold = None if new.gold is None else checked(task, new.gold, texts, settings)
    except SteersmanError as error:
        raise SteersmanError(f"{where}, gold: {error}") from error
    if gold is not None and "skip" in gold:
        raise SteersmanError(f"{where}, gold: a skip is no verdict that a rater can be measured by")
    return gold


def asking_queues() -> Select[Any]:
    """The queues whose items raters are asked to judge, oldest first."""
    return select(Queue).where(Queue.name != CHAT, Queue.overlap > 0).order_by(Queue.id)
