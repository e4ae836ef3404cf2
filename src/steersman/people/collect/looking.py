"""What an admin sees: every judgement, searchable, and how the raters do."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from itertools import islice
from statistics import median
from typing import Any

from sqlalchemy import select
from starlette.responses import Response

from steersman.people.collect.visit import Visit
from steersman.people.store.assignments import coverage
from steersman.people.store.conversations import all_turns, path_to
from steersman.people.store.judgements import live
from steersman.people.store.opinions import (
    Opinion,
    count,
    everything,
    gold_results,
    model_names,
    newest,
    newest_thumbs,
)
from steersman.people.store.schema import Conversation, JudgementRow, Person, Rater, Turn
from steersman.statistics.agreement import Metric, Rated, alpha
from steersman.statistics.estimates import Estimate

SHOWN = 200
CATEGORIES: dict[str, tuple[Any, ...]] = {
    "compare": (0, 1, "tie", "both_bad"), "thumb": (False, True), "review": (False, True),
}  # fmt: skip
KEYS = {"compare": "choice", "thumb": "up", "review": "accept"}


def judgements(visit: Visit) -> Response:
    """The newest judgements that hold the words that are looked for, of one task or rater where asked.

    No more than is shown is read; so of those with the words it is told that there are more, and not how many.
    """
    asked = visit.request.query_params
    words, task, rater = (asked.get(name, "").strip() for name in ("q", "task", "rater"))
    with visit.store.read() as session:
        told = newest(session, task=task, rater=rater)
        found = list(islice((one for one in told if _holds(one, words)), SHOWN + 1))
        many = f"{SHOWN}+" if len(found) > SHOWN else str(len(found))
        many = many if words else str(count(session, task=task, rater=rater))
    rows = [(one, _when(one.created)) for one in found[:SHOWN]]
    return visit.page("look.html", rows=rows, count=many, q=words, task=task, rater=rater)


def conversations(visit: Visit) -> Response:
    """The newest chats in which any turn holds the words."""
    asked = visit.request.query_params
    words, rater = (asked.get(name, "").strip()[:300] for name in ("q", "rater"))
    found = (
        select(Conversation, Rater.pseudonym)
        .join(Rater, Rater.id == Conversation.rater_id)
        .order_by(Conversation.created.desc())
        .limit(SHOWN)
    )
    if rater:
        found = found.where(Rater.pseudonym == rater)
    for word in words.split():
        holds = Turn.content.icontains(word, autoescape=True)
        found = found.where(select(Turn.id).where(Turn.conversation_id == Conversation.id, holds).exists())
    with visit.store.read() as session:
        rows = [
            {"id": chat.id, "title": chat.title, "rater": who, "when": _when(chat.created)}
            for chat, who in session.execute(found)
        ]
    return visit.page("look_chats.html", rows=rows, q=words, rater=rater)


def conversation(visit: Visit) -> Response:
    """All turns of a chat, those of other branches too, with their models and what was said of them."""
    with visit.store.read() as session:
        chat = session.get(Conversation, visit.arg("chat"))
        if chat is None:
            return visit.error_page("404", 404)
        turns, models = all_turns(session, chat.id), model_names(session)
        shown = {turn.id for turn in path_to(turns, chat.leaf_id)}
        said: dict[str, list[str]] = defaultdict(list)
        of_turns = select(JudgementRow).where(JudgementRow.turn_id.in_(list(turns)), live())
        for row in session.scalars(of_turns.order_by(JudgementRow.id)):
            said[str(row.turn_id)].append(f"{row.task}: {row.verdict}")
        rows = [
            {
                "role": turn.role, "content": turn.content, "model": str(models[turn.model_id]),
                "shown": turn.id in shown, "said": said[turn.id],
            }
            for turn in turns.values()
        ]  # fmt: skip
    return visit.page("look_chat.html", chat=chat, turns=rows)


def overview(visit: Visit) -> Response:
    """Raters: how many judgements, seconds, gold items, and whether their pace drifts; how far the queues are."""
    with visit.store.read() as session:
        by_rater: dict[str, list[Opinion]] = defaultdict(list)
        for one in everything(session, texts=False):
            by_rater[one.rater].append(one)
        agreed = agreement([one for rated in by_rater.values() for one in rated])
        gold, queues = gold_results(session), coverage(session)
        names = {
            rater: (name, role)
            for rater, name, role in session.execute(
                select(Rater.pseudonym, Person.name, Person.role).join(Person, Person.rater_id == Rater.id)
            )
        }
    rows = []
    for rater in sorted({*by_rater, *gold, *names}):
        seconds = [o.seconds for o in by_rater[rater] if o.seconds is not None]
        half, right = len(seconds) // 2, gold.get(rater, [])
        halves = f"{median(seconds[:half]):.1f} / {median(seconds[half:]):.1f}" if half else ""
        rows.append(
            {
                "rater": rater, "name": names.get(rater, ("", ""))[0], "role": names.get(rater, ("", ""))[1],
                "count": len(by_rater[rater]), "seconds": f"{median(seconds):.1f}" if seconds else "",
                "gold": f"{sum(right)} / {len(right)}" if right else "", "drift": halves,
            }
        )  # fmt: skip
    return visit.page("admin.html", rows=rows, agreed=agreed, queues=queues)


def agreement(told: list[Opinion]) -> list[tuple[str, Estimate]]:
    """Krippendorff's alpha of each queue, and of each attribute of its ratings; rankings and marks have none."""
    rated: dict[tuple[str, Metric], list[Rated]] = defaultdict(list)
    for one in newest_thumbs(told):
        if one.task == "rate":
            for name, score in one.verdict.get("scores", {}).items():
                rated[f"{one.queue}: {name}", "ordinal"].append((one.subject, float(score)))
        elif one.task in CATEGORIES and "skip" not in one.verdict:
            said = one.verdict[KEYS[one.task]]
            place = float(CATEGORIES[one.task].index(said))
            rated[f"{one.queue} ({one.task})", "nominal"].append((one.subject, place))
    found = [(name, alpha(rated[name, metric], metric)) for name, metric in sorted(rated)]
    return [(name, estimate) for name, estimate in found if estimate.n]


def _holds(one: Opinion, words: str) -> bool:
    text = "\n".join([str(one.prompt), *one.answers, str(one.verdict)]).lower()
    return all(word in text for word in words.lower().split())


def _when(seconds: float) -> str:
    """The time in words; as a number where no calendar has it."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"
