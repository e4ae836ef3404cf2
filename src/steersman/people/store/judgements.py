"""Judgements: written once, taken back by another row, never changed."""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session, aliased

from steersman.people.store.assignments import ShownItem, has_place, held_queue
from steersman.people.store.database import found_or_made, now
from steersman.people.store.schema import HERE, Assignment, Item, JudgementRow, Rater, Turn
from steersman.people.store.verdicts import checked
from steersman.types import SteersmanError

UNDO = "undo"
LONGEST_SECONDS = 24 * 3600.0


def judge_item(
    session: Session, shown: ShownItem, verdict: Any, *, key: str, seconds: float | None = None
) -> JudgementRow:
    """Stores the verdict on an item that the rater was shown, and closes it.

    The same `key` again gives the row that is there already; so does another verdict on a closed item, since the
    first one counts until it is undone. The caller holds the assignment's row (`own_assignment(lock=True)`).
    """
    task, assignment = shown.queue.task, shown.assignment
    found = by_key(session, key, assignment.rater_id)
    if found is None and assignment.state != "open":
        found = session.scalar(
            select(JudgementRow).where(
                JudgementRow.item_id == shown.item.id, JudgementRow.rater_id == assignment.rater_id, live()
            )
        )
    if found is not None:
        return found
    said = checked(task, verdict, shown.texts, shown.queue.settings)
    row = _row(
        task, assignment.rater_id, said, key=key, item_id=shown.item.id, sides=list(assignment.sides), seconds=seconds
    )
    stored = _insert(session, row)
    assignment.state = "skipped" if "skip" in said else "judged"
    return stored


def judge_turn(
    session: Session, turn: Turn, rater_id: int, verdict: Any, *, key: str, seconds: float | None = None
) -> JudgementRow:
    """Stores a thumb for an answer in a chat; of several by one rater the newest counts."""
    found = by_key(session, key, rater_id)
    if found is not None:
        return found
    said = checked("thumb", verdict, [turn.content], {})
    return _insert(session, _row("thumb", rater_id, said, key=key, turn_id=turn.id, seconds=seconds))


def undo(session: Session, rater_id: int, *, key: str) -> JudgementRow | None:
    """Takes back the rater's newest judgement and opens its item again; None where there is none to take back.

    A skip of an item that as many others as its queue asks for have taken since is none either.
    """
    found = by_key(session, key, rater_id)
    if found is not None:
        return found
    session.get_one(Rater, rater_id, with_for_update={"key_share": True})  # two at once take back two judgements
    last = session.scalar(
        select(JudgementRow)
        .where(JudgementRow.rater_id == rater_id, live())
        .order_by(JudgementRow.id.desc())
        .limit(1)
    )
    if last is None or ("skip" in last.verdict and not _is_wanted(session, str(last.item_id))):
        return None
    row = _insert(
        session, _row(UNDO, rater_id, {}, key=key, item_id=last.item_id, turn_id=last.turn_id, undoes=last.id)
    )
    if last.item_id is not None:
        again = session.scalar(
            select(Assignment).where(Assignment.item_id == last.item_id, Assignment.rater_id == rater_id)
        )
        if again is not None:
            again.state = "open"
    return row


def _is_wanted(session: Session, item_id: str) -> bool:
    """Whether an item wants one more rater; nobody else is given it before the transaction ends."""
    item = session.get_one(Item, item_id)
    held_queue(session, item.queue_id)
    return has_place(session, item)


def live() -> ColumnElement[bool]:
    """True of judgements that were not taken back and take none back."""
    later = aliased(JudgementRow)
    return (JudgementRow.task != UNDO) & ~select(later.id).where(later.undoes == JudgementRow.id).exists()


def by_key(session: Session, key: str, rater_id: int) -> JudgementRow | None:
    """The judgement that was sent under this key. Raises SteersmanError for no UUID and for another rater's."""
    found = session.scalar(select(JudgementRow).where(JudgementRow.key == checked_key(key)))
    if found is not None and found.rater_id != rater_id:
        raise SteersmanError("key: another judgement has this key; make a new random UUID")
    return found


def thumbs(session: Session, rater_id: int, turn_ids: list[str]) -> dict[str, JudgementRow]:
    """The rater's newest thumb for each of the turns."""
    rows = session.scalars(
        select(JudgementRow)
        .where(JudgementRow.rater_id == rater_id, JudgementRow.turn_id.in_(turn_ids), live())
        .order_by(JudgementRow.id)
    )
    return {str(row.turn_id): row for row in rows}


def checked_key(key: str) -> str:
    try:
        return str(uuid.UUID(key))
    except (ValueError, AttributeError, TypeError):
        raise SteersmanError(
            "key: every judgement and every message carries a random UUID of its client's making"
        ) from None


def _row(task: str, rater_id: int, verdict: dict[str, Any], *, key: str, **more: Any) -> JudgementRow:
    seconds = more.pop("seconds", None)
    if seconds is not None:
        seconds = min(max(float(seconds), 0.0), LONGEST_SECONDS) if seconds == seconds else None
    return JudgementRow(
        key=checked_key(key), rater_id=rater_id, task=task, verdict=verdict, seconds=seconds, created=now(),
        source=HERE, **more,
    )  # fmt: skip


def _insert(session: Session, row: JudgementRow) -> JudgementRow:
    """The row, which was not there a moment ago; where the same request came twice at once, the first one's."""

    def make() -> JudgementRow:
        session.add(row)
        return row

    return found_or_made(session, lambda: by_key(session, row.key, row.rater_id), make)[0]
