"""Short ways to fill a store."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from sqlalchemy import select

from steersman.people.store import Store
from steersman.people.store.assignments import next_item, own_assignment, shown_item
from steersman.people.store.conversations import TurnText
from steersman.people.store.items import NewItem, add_item, make_queue
from steersman.people.store.judgements import judge_item
from steersman.people.store.raters import add_person
from steersman.people.store.schema import Queue

SQLITE = pytest.mark.parametrize("address", ["sqlite"], indirect=True)
"""For tests of what does not depend on the kind of database: the others run on both."""


REASONING = (
    '<details type="reasoning" done="true" duration="3">\n<summary>Thought for 3 seconds</summary>\n'
    "&gt; hm\n</details>"
)
TOOL = (
    '<details type="tool_calls" done="true" id="1" name="clock" arguments="&quot;{}&quot;">\n'
    "<summary>Tool Executed</summary>\n</details>"
)
"""Blocks that Open WebUI writes into the text of an answer."""


def key() -> str:
    return str(uuid.uuid4())


def rater(store: Store, name: str, **more: Any) -> int:
    with store.begin() as session:
        return add_person(session, name, **more).id


def queue(store: Store, task: str, items: list[NewItem], name: str = "", **settings: Any) -> int:
    with store.begin() as session:
        made = make_queue(session, name or task, task, **settings)
        for item in items:
            add_item(session, made, item)
        return made.id


def pair(number: int, **more: Any) -> NewItem:
    answers = [TurnText(f"good {number}", ("base", "1")), TurnText(f"bad {number}", ("tuned", "2"))]
    return NewItem(f"question {number}", answers, **more)


def judge(store: Store, queue_id: int, rater_id: int, verdict: Any, **more: Any) -> str | None:
    """Judges what comes next; the item's id, None where nothing is left. `verdict` may be a function of it."""
    with store.begin() as session:
        got = next_item(session, queue_id, rater_id)
        if got is None:
            return None
        assignment = own_assignment(session, got.assignment.id, rater_id, lock=True)
        assert assignment is not None
        said = verdict(got) if callable(verdict) else verdict
        judge_item(session, shown_item(session, assignment), said, key=more.pop("key", key()), **more)
        return got.item.id


def queue_named(store: Store, name: str) -> Queue:
    with store.read() as session:
        return session.scalars(select(Queue).where(Queue.name == name)).one()
