"""Home, the items of the queues, undo."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import Response

from steersman.people.collect.forms import seconds_of, verdict_of
from steersman.people.collect.visit import Visit, go, own_path
from steersman.people.store.assignments import (
    ShownItem,
    next_item,
    own_assignment,
    place_of,
    progress,
    shown_item,
)
from steersman.people.store.conversations import TurnText, add_turn, messages, path
from steersman.people.store.items import CHAT, asking_queues
from steersman.people.store.judgements import checked_key, judge_item, undo
from steersman.people.store.schema import Assignment, Conversation, Model, Queue, Turn

NUMBER = re.compile("[0-9]{1,9}")
"""Of a queue, in an address: what is longer is larger than the largest number of a database."""


def home(visit: Visit) -> Response:
    with visit.store.read() as session:
        queues = session.scalars(asking_queues()).all()
        rows = [(queue, progress(session, queue, visit.rater.rater_id)) for queue in queues]
    return visit.page("home.html", rows=rows, chats=bool(visit.site.answerers))


def next_page(visit: Visit) -> Response:
    with visit.store.begin(
        flushed=False
    ) as session:  # who sees what is lost with the judgement after it, or not at all
        number = visit.arg("queue")
        queue = session.get(Queue, int(number)) if NUMBER.fullmatch(number) else None
        if queue is None or queue.name == CHAT:
            return visit.error_page("404", 404)
        got = next_item(session, queue.id, visit.rater.rater_id)
        place = place_of(session, queue, visit.rater.rater_id)
    return visit.page("nothing.html") if got is None else _item(visit, got, place)


def item_page(visit: Visit) -> Response:
    with visit.store.read() as session:
        assignment = own_assignment(session, visit.arg("assignment"), visit.rater.rater_id)
        if assignment is None:
            return visit.error_page("404", 404)
        got = shown_item(session, assignment)
        place = place_of(session, got.queue, visit.rater.rater_id)
    if assignment.state != "open":  # the back button, after the verdict was saved
        return go(_after(got))
    return _item(visit, got, place)


def judge(visit: Visit) -> Response:
    with visit.store.begin() as session:
        assignment = own_assignment(session, visit.arg("assignment"), visit.rater.rater_id, lock=True)
        if assignment is None:
            return visit.error_page("404", 404)
        got = shown_item(session, assignment)
        was_open = assignment.state == "open"
        key = visit.field("key")
        row = judge_item(session, got, verdict_of(visit.form, got), key=key, seconds=seconds_of(visit.form))
        if got.item.conversation_id and was_open:
            _go_on(session, got, row.verdict.get("choice"))
    return go(_after(got) if row.key == checked_key(key) else f"{_after(got)}?note=stands")


def take_back(visit: Visit) -> Response:
    with visit.store.begin() as session:
        row = undo(session, visit.rater.rater_id, key=str(visit.form.get("key")))
        again = None
        if row is not None and row.item_id is not None:
            again = session.scalar(
                select(Assignment).where(
                    Assignment.item_id == row.item_id, Assignment.rater_id == visit.rater.rater_id
                )
            )
        turn = None if row is None or row.turn_id is None else session.get(Turn, row.turn_id)
    if again is not None:
        return go(f"/item/{again.id}?note=undone")
    if turn is not None:
        return go(f"/chat/{turn.conversation_id}?note=thumb_undone")
    return go(f"{own_path(visit.field('path'))}?note=undo_nothing")


def _go_on(session: Session, got: ShownItem, choice: Any) -> None:
    """The chat goes on with the better answer, or, where none is, with the one that stood first on the screen.

    Where the path that is shown has left the question behind (an earlier verdict was undone, or another tab went on),
    it stays as it is.
    """
    chat = session.get_one(Conversation, str(got.item.conversation_id), with_for_update=True)
    turns = path(session, chat)
    asked = turns[:-1] if turns[-1].role == "assistant" else turns  # answered already: by a verdict that was undone
    if messages(asked) != got.item.prompt:
        return
    answer = got.answers[choice if choice in (0, 1) else got.assignment.sides[0]]
    model = session.get_one(Model, answer.model_id) if answer.model_id else None
    said = TurnText(answer.content, (model.name, model.version) if model else None, answer.sampling, answer.finish)
    add_turn(session, chat, "assistant", said, asked[-1].id)


def _after(got: ShownItem) -> str:
    return f"/chat/{got.item.conversation_id}" if got.item.conversation_id else f"/judge/{got.queue.id}"


def _item(visit: Visit, got: ShownItem, place: tuple[int, int] | None) -> Response:
    """The page of an item: it holds nothing that tells which model answered, nor any id but the assignment's."""
    prompt = got.item.prompt
    turns = [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt
    return visit.page(
        "item.html", task=got.queue.task, settings=got.queue.settings, turns=turns,
        answers=[a.content for a in got.sides], assignment=got.assignment.id, queue=got.queue.name,
        place=place,
    )  # fmt: skip
