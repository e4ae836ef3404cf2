"""Chats with one model, whose answers get thumbs, or with two, whose answers are compared blind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import Response

from steersman.people.collect.forms import REASONS, seconds_of, text_of, thumb_of
from steersman.people.collect.visit import Visit, go
from steersman.people.store.assignments import assign
from steersman.people.store.conversations import (
    TurnText,
    add_turn,
    all_turns,
    branch,
    messages,
    path,
    path_to,
    start,
)
from steersman.people.store.items import CHAT, NewItem, add_item, make_queue
from steersman.people.store.judgements import checked_key, judge_turn, thumbs
from steersman.people.store.schema import Assignment, Conversation, Item, Turn
from steersman.people.store.verdicts import storable
from steersman.types import SteersmanError

LONGEST_MESSAGE = 20_000


def chats(visit: Visit) -> Response:
    if visit.request.method == "POST":
        with visit.store.begin() as session:
            made = start(session, visit.rater.rater_id, system=visit.site.system)
        return go(f"/chat/{made.id}")
    with visit.store.read() as session:
        mine = session.scalars(
            select(Conversation)
            .where(Conversation.rater_id == visit.rater.rater_id)
            .order_by(Conversation.created.desc())
            .limit(100)
        ).all()
    return visit.page("chats.html", chats=mine, can=bool(visit.site.answerers))


def show(visit: Visit) -> Response:
    with visit.store.read() as session:
        chat = _own(session, visit)
        if chat is None:
            return visit.error_page("404", 404)
        turns = path(session, chat)
        compare = next(iter(_open_comparisons(session, visit, chat)), None)
        said = thumbs(session, visit.rater.rater_id, [t.id for t in turns])
    if compare is not None:
        return go(f"/item/{compare[0].id}")
    verdicts = {turn_id: row.verdict for turn_id, row in said.items()}
    waits = bool(turns) and turns[-1].role == "user"
    return visit.page("chat.html", chat=chat, turns=turns, thumbs=verdicts, reasons=REASONS, waits=waits)


def say(visit: Visit) -> Response:
    text = _message(visit)
    with visit.store.begin() as session:
        chat = _own(session, visit, lock=True)
        if chat is None:
            return visit.error_page("404", 404)
        turns, (said, turn_id) = path(session, chat), _said(session, visit, chat, text)
        if turns and turns[-1].role == "user" and turns[-1].content == text:  # its answer did not come
            asked = turns[-1]
        elif said:
            return go(f"/chat/{chat.id}#last")
        else:
            asked = add_turn(session, chat, "user", TurnText(text), turn_id=turn_id)
        leaf = chat.leaf_id
    return _answered(visit, chat.id, asked.id, leaf)


def answer(visit: Visit) -> Response:
    """An answer that is missing, or another one in the place of the last, which stays until that one is there."""
    with visit.store.begin() as session:
        chat = _own(session, visit, lock=True)
        if chat is None:
            return visit.error_page("404", 404)
        turns = path(session, chat)
        if turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        if not turns or turns[-1].role != "user":
            return visit.error_page("there is nothing to answer")
        leaf = chat.leaf_id
    return _answered(visit, chat.id, turns[-1].id, leaf)


def edit(visit: Visit) -> Response:
    """Goes on from another wording of a message of the user's, once it is answered."""
    text = _message(visit)
    with visit.store.begin() as session:
        chat, turn = _own(session, visit, lock=True), session.get(Turn, visit.arg("turn"))
        if chat is None or turn is None or turn.conversation_id != chat.id or turn.role != "user":
            return visit.error_page("404", 404)
        shown, (said, turn_id) = chat.leaf_id, _said(session, visit, chat, text)
        asked = _unanswered(all_turns(session, chat.id), turn, text)
        if asked is None and said:
            return go(f"/chat/{chat.id}#last")
        asked = asked or branch(session, chat, turn, "user", TurnText(text), turn_id=turn_id)
        chat.leaf_id = shown
    return _answered(visit, chat.id, asked.id, shown)


def _said(session: Session, visit: Visit, chat: Conversation, text: str) -> tuple[bool, str | None]:
    """Whether this very form was stored already, as where its answer was lost on the way to the browser, and the id
    for its message: the form's key, unless another message has it."""
    turn_id = checked_key(visit.field("key"))
    known = session.get(Turn, turn_id)
    if known is None:
        return False, turn_id
    return known.conversation_id == chat.id and known.content == storable(text), None


def _unanswered(turns: dict[str, Turn], beside: Turn, text: str) -> Turn | None:
    """The same wording from before, whose answer did not come."""
    answered = {turn.parent_id for turn in turns.values()}
    same = (t for t in turns.values() if t.parent_id == beside.parent_id and t.role == "user" and t.content == text)
    return next((turn for turn in same if turn.id not in answered), None)


def thumb(visit: Visit) -> Response:
    with visit.store.begin() as session:
        chat, turn = _own(session, visit), session.get(Turn, visit.arg("turn"))
        if chat is None or turn is None or turn.conversation_id != chat.id or turn.role != "assistant":
            return visit.error_page("404", 404)
        key, seconds = str(visit.form.get("key")), seconds_of(visit.form)
        judge_turn(session, turn, visit.rater.rater_id, thumb_of(visit.form), key=key, seconds=seconds)
    return go(f"/chat/{chat.id}#last")


def _answered(visit: Visit, chat_id: str, question: str, leaf: str | None) -> Response:
    """The answer to a turn, behind which the chat then goes on, where its path still ends with `leaf`; what is shown
    stays as it is until it is there.

    Asks every model at once and shows nothing until all have answered: not even time tells them apart.
    """
    if not visit.site.answerers:
        return visit.error_page("no model answers here")
    with visit.store.read() as session:
        asked = messages(path_to(all_turns(session, chat_id), question))
        waiting = _comparison_of(session, visit, session.get_one(Conversation, chat_id), asked)
    if waiting is not None:
        return go(f"/item/{waiting.id}")
    with ThreadPoolExecutor(len(visit.site.answerers)) as pool:
        said = list(pool.map(lambda a: a.answer(asked, visit.rater.pseudonym), visit.site.answerers))
    with visit.store.begin() as session:
        chat = session.get_one(Conversation, chat_id, with_for_update=True)
        if chat.leaf_id != leaf:  # another tab went on in the meantime
            return go(f"/chat/{chat_id}#last")
        waiting = _comparison_of(session, visit, chat, asked)  # the same message was sent twice at once
        if waiting is not None:
            return go(f"/item/{waiting.id}")
        if len(said) == 1 or said[0].content == said[1].content:
            add_turn(session, chat, "assistant", said[0], question)
            return go(f"/chat/{chat_id}#last")
        queue = make_queue(session, CHAT, "compare")
        item = add_item(session, queue, NewItem(asked, said, source="chat"), conversation_id=chat_id)
        assert item is not None  # an item of a conversation is always new
        got = assign(session, item, visit.rater.rater_id)
        chat.leaf_id = question  # the verdict goes on from here
    return go(f"/item/{got.assignment.id}")


def _own(session: Session, visit: Visit, *, lock: bool = False) -> Conversation | None:
    """The chat of the address, where it is the rater's; with `lock` nobody else adds to it before the block ends."""
    found = session.get(Conversation, visit.arg("chat"), with_for_update=lock)
    return found if found is not None and found.rater_id == visit.rater.rater_id else None


def _open_comparisons(session: Session, visit: Visit, chat: Conversation) -> list[tuple[Assignment, Item]]:
    """The comparisons of a chat that wait for a verdict, the newest first."""
    found = session.execute(
        select(Assignment, Item)
        .join(Item, Item.id == Assignment.item_id)
        .where(
            Item.conversation_id == chat.id, Assignment.state == "open", Assignment.rater_id == visit.rater.rater_id
        )
        .order_by(Assignment.created.desc())
    )
    return [(assignment, item) for assignment, item in found]


def _comparison_of(
    session: Session, visit: Visit, chat: Conversation, asked: list[dict[str, str]]
) -> Assignment | None:
    """The comparison of the answers to these messages that waits for a verdict."""
    return next((one for one, item in _open_comparisons(session, visit, chat) if item.prompt == asked), None)


def _message(visit: Visit) -> str:
    text = text_of(visit.form, "text").strip()
    if not text:
        raise SteersmanError("the message is empty")
    if len(text) > LONGEST_MESSAGE:
        raise SteersmanError(f"the message has {len(text):,} characters; {LONGEST_MESSAGE:,} are the most")
    return text
