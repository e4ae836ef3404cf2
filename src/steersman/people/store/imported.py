"""How judgements of another program enter the store: compared with what an earlier import left there.

A file may come again longer, in another order, or with other opinions. So nothing goes by the place of a row: what
one rater says of one subject, in a whole file, is held against what the store has from them, verdict by verdict.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from steersman.guards.terminal import printable
from steersman.people.store.conversations import TurnText
from steersman.people.store.database import IMPORTING, Store, new_id, pieces, take_turns
from steersman.people.store.items import LONGEST_NAME, NewItem, add_items, check_item, make_queue
from steersman.people.store.judgements import UNDO, live
from steersman.people.store.names import fitting
from steersman.people.store.raters import imported_rater
from steersman.people.store.schema import Item, JudgementRow
from steersman.people.store.verdicts import checked, storable
from steersman.types import SteersmanError

SPACE = uuid.UUID("5e4b1c5e-7a0f-4d1b-9a55-1b7e0d4f3c21")
STARS = 5
"""Steps of a scale whose export does not say how long it is."""
MOST_STEPS = 100
"""Of a scale: a larger rating is none, and would make so many steps."""
EMPTY = "an answer is empty"
SAME = "two answers are the same text"
ODD = "what can not be read"
FIRST_ODD = 3
"""Of what can not be read, how many are told with place and reason."""
LONGEST_REASON = 400
"""Characters of a file's text in a message."""
LATEST = 1e11
"""A time in seconds (the year 5138) that nothing was said after: a larger one counts something smaller."""


@dataclass(slots=True)
class ImportCounts:
    """What an import did: rows stored by task, those of them that took the place of another verdict, rows left out by
    reason, and rows that say more than one verdict can (it is the one of their majority).

    `odd` has the place and the reason of the first that can not be read, and `sides` how many comparisons of Label
    Studio were read with these two fields on the left and on the right.
    """

    stored: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    rounded: Counter[str] = field(default_factory=Counter)
    odd: list[str] = field(default_factory=list)
    sides: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class ToldQueue:
    """The queue of a file's items, which nobody is asked to judge (its overlap is 0)."""

    name: str
    task: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What somebody said in another program: of an item, or of a turn of a chat.

    `who` is the rater (`raters.imported_name`), `when` the time of the judgement, and `as_of` that of the state
    of things that the file shows: of two files with different opinions, the one with the later state counts.
    """

    who: str
    verdict: dict[str, Any]
    source: str
    when: float
    as_of: float
    task: str
    item: NewItem | None = None
    queue: ToldQueue | None = None
    turn_id: str | None = None
    seconds: float | None = None

    @property
    def subject(self) -> str:
        return str(self.turn_id) if self.item is None else self.item.id


@contextmanager
def odd_left_out(done: ImportCounts, where: str) -> Iterator[None]:
    """What can not be read is counted and left out, with place and reason: one odd record refuses no export."""
    try:
        yield
    except SteersmanError as error:
        problem = str(error)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        problem = f"not as this program writes it ({type(error).__name__}: {error})"
    else:
        return
    done.left_out[ODD] += 1
    if len(done.odd) < FIRST_ODD:
        done.odd.append(f"{where}: {shown(problem)}")


def shown(text: str) -> str:
    """Text of a file as it may stand in a line of a message: one line, of some length, that no terminal obeys."""
    return printable(" ".join(text[:LONGEST_REASON].split()))


def told_time(got: float) -> float:
    """A time of another program in seconds since 1970; where it can only be milli-, micro- or nanoseconds, these are
    turned into seconds. Raises ValueError for what is no such time."""
    for unit in (1, 1e3, 1e6, 1e9):
        if 0 <= got / unit < LATEST:
            return got / unit
    raise ValueError(f"the time {got!r} is no seconds since 1970")


def source_id(*parts: Any) -> str:
    """The id of what these parts name in the other program: the same at every import."""
    return str(uuid.uuid5(SPACE, "\0".join(map(str, parts))))


def told_of_item(
    name: str, task: str, prompt: Any, answers: list[TurnText], verdict: Any, *, settings: dict[str, Any], **more: Any
) -> Told:
    """A verdict on an item of the queue of an import. Raises SteersmanError for an item or a verdict that is none."""
    queue = ToldQueue(f"{fitting(name, LONGEST_NAME - len(task) - 3)} ({task})", task, settings)
    texts = [storable(a.content) for a in answers]
    item = NewItem(prompt, answers, source=name, id=source_id(queue.name, repr(prompt), *texts))
    check_item(queue.name, task, item, settings)
    said = checked(task, verdict, texts, settings)
    return Told(verdict=said, task=task, item=item, queue=queue, **more)


def store_told(store: Store, told: list[Told], done: ImportCounts) -> None:
    """Stores what is new, and counts it; what is there already is left out.

    Where a rater's opinion of a subject is another one now, the old row is taken back by a new one, as by /undo.
    """
    groups: dict[tuple[str, str], list[Told]] = defaultdict(list)
    for one in told:
        groups[one.who, one.subject].append(one)
    queues = _queues(told)
    for piece in pieces(groups.values()):
        with store.begin() as session:
            take_turns(session.connection(), IMPORTING)
            _store_piece(session, piece, queues, done)


def _queues(told: list[Told]) -> dict[str, ToldQueue]:
    """Every queue by name, with the longest scale of each of its attributes."""
    out: dict[str, ToldQueue] = {}
    for one in told:
        if one.queue is None:
            continue
        known = out.setdefault(one.queue.name, ToldQueue(one.queue.name, one.queue.task))
        scales = known.settings.get("attributes", {})
        for name, steps in one.queue.settings.get("attributes", {}).items():
            if len(steps) > len(scales.get(name, ())):
                known.settings["attributes"] = scales = {**scales, name: steps}
    return out


def _store_piece(
    session: Session, groups: list[list[Told]], queues: dict[str, ToldQueue], done: ImportCounts
) -> None:
    raters = {who: imported_rater(session, who) for who in dict.fromkeys(group[0].who for group in groups)}
    _store_items(session, [group[0] for group in groups], queues)
    there: dict[tuple[int, str], list[JudgementRow]] = defaultdict(list)
    subjects = [group[0].subject for group in groups]
    rows = session.scalars(
        select(JudgementRow)
        .where(
            JudgementRow.rater_id.in_(raters.values()), live(),
            or_(JudgementRow.item_id.in_(subjects), JudgementRow.turn_id.in_(subjects)),
        )
        .order_by(JudgementRow.id)
    )  # fmt: skip
    for row in rows:
        there[row.rater_id, str(row.item_id or row.turn_id)].append(row)
    for group in groups:
        rater = raters[group[0].who]
        session.add_all(_new_rows(group, rater, there[rater, group[0].subject], done))
    session.flush()


def _store_items(session: Session, told: list[Told], queues: dict[str, ToldQueue]) -> None:
    items: dict[str, dict[str, NewItem]] = defaultdict(dict)
    for one in told:
        if one.item is not None and one.queue is not None:
            items[one.queue.name][one.item.id] = one.item
    for name, new in items.items():
        queue = make_queue(session, name, queues[name].task, overlap=0, **queues[name].settings)
        known = set(session.scalars(select(Item.id).where(Item.id.in_(new))))
        missing = [item for item in new.values() if item.id not in known]
        if len(add_items(session, queue, missing)) < len(missing):
            raise SteersmanError(f"{name}: an item is there already under another id")


def _new_rows(group: list[Told], rater: int, there: list[JudgementRow], done: ImportCounts) -> Iterator[JudgementRow]:
    """The rows for what one rater says of one subject that the store does not have from them."""
    other = []
    for one in group:
        same = next((row for row in there if row.verdict == one.verdict), None)
        if same is None:
            other.append(one)
        else:
            there.remove(same)
            done.left_out["there already"] += 1
    for one in other:
        if there and there[0].created >= one.as_of:
            there.pop(0)
            done.left_out["older than what is there"] += 1
            continue
        old = there.pop(0) if there else None
        if old is not None:
            yield _row(one, rater, task=UNDO, verdict={}, created=one.as_of, undoes=old.id)
            done.changed[one.task] += 1
        done.stored[one.task] += 1
        yield _row(
            one, rater, task=one.task, verdict=one.verdict, seconds=one.seconds,
            created=one.when if old is None else one.as_of,
        )  # fmt: skip


def _row(one: Told, rater: int, **more: Any) -> JudgementRow:
    item_id = None if one.item is None else one.item.id
    return JudgementRow(
        key=new_id(), rater_id=rater, item_id=item_id, turn_id=one.turn_id, source=one.source, sides=None, **more
    )
