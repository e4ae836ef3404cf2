"""The judgements that count, each with what it was about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from steersman.data.config import CountingConfig
from steersman.people.store.conversations import all_turns, messages, path_to
from steersman.people.store.items import CHAT
from steersman.people.store.judgements import live
from steersman.people.store.schema import Answer, Item, JudgementRow, Model, Queue, Rater, Turn
from steersman.people.store.verdicts import Verdict, agrees


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one rater said of one item or turn.

    `subject` is the id of that item or turn, `prompt` text or messages, `answers` and `models` go by the numbers that
    the verdict uses; a model is "name@version", or empty where nobody knows.
    """

    number: int
    task: str
    rater: str
    weight: float
    verdict: Verdict
    subject: str
    queue: str
    prompt: Any
    answers: list[str]
    models: list[str]
    created: float
    seconds: float | None


def opinions(session: Session, config: CountingConfig) -> list[Opinion]:
    """All that count under the configuration, oldest first: no skips, no gold items, nothing that was undone, of the
    thumbs of one rater for one turn the newest, and no rater without weight or with too few gold items right."""
    results = gold_results(session) if config.min_gold else {}
    poor = {rater for rater, right in results.items() if sum(right) < config.min_gold * len(right)}
    found = [
        one
        for one in everything(session)
        if "skip" not in one.verdict
        and one.rater not in poor
        and config.weights.get(one.rater, 1.0) > 0
        and (not config.queues or one.queue in config.queues)
    ]
    return [replace(one, weight=config.weights.get(one.rater, 1.0)) for one in newest_thumbs(found)]


def newest_thumbs(found: Iterable[Opinion]) -> list[Opinion]:
    """The opinions in their order, of the thumbs of one rater for one turn only the newest."""
    told = list(found)
    newest = {(o.rater, o.subject): o.number for o in told if o.task == "thumb"}
    return [o for o in told if o.task != "thumb" or newest[o.rater, o.subject] == o.number]


def everything(session: Session, *, gold: bool = False) -> Iterator[Opinion]:
    """Every live judgement, skips too, of items without a known verdict, or of those with one."""
    models = model_names(session)
    answers: dict[str, list[Answer]] = defaultdict(list)
    for answer in session.scalars(select(Answer).order_by(Answer.item_id, Answer.number)):
        answers[answer.item_id].append(answer)
    paths = _Paths(session)
    rows = session.execute(
        select(JudgementRow, Rater.pseudonym, Item, Queue.name, Turn)
        .join(Rater, Rater.id == JudgementRow.rater_id)
        .outerjoin(Item, Item.id == JudgementRow.item_id)
        .outerjoin(Queue, Queue.id == Item.queue_id)
        .outerjoin(Turn, Turn.id == JudgementRow.turn_id)
        .where(live())
        .order_by(JudgementRow.id)
    )
    for judgement, rater, item, queue, turn in rows:
        if item is not None and (item.gold is not None) == gold:
            of = answers[item.id]
            about = item.id, queue, item.prompt, [a.content for a in of], [models.get(a.model_id, "") for a in of]
        elif turn is not None and not gold:
            about = turn.id, CHAT, paths.before(turn), [turn.content], [models.get(turn.model_id, "")]
        else:
            continue
        yield Opinion(
            judgement.id, judgement.task, rater, 1.0, judgement.verdict, *about, judgement.created, judgement.seconds
        )


def gold_results(session: Session) -> dict[str, list[bool]]:
    """For each rater, which gold items they got right, in order; a skipped one is wrong."""
    known = {item.id: item.gold for item in session.scalars(select(Item).where(Item.gold.is_not(None)))}
    right: dict[str, list[bool]] = defaultdict(list)
    for one in everything(session, gold=True):
        right[one.rater].append(agrees(one.task, known[one.subject] or {}, one.verdict))
    return dict(right)


def model_names(session: Session) -> dict[int | None, str]:
    return {m.id: f"{m.name}@{m.version}" if m.version else m.name for m in session.scalars(select(Model))}


class _Paths:
    """The messages before a turn; each conversation is read once."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.known: dict[str, dict[str, Turn]] = {}

    def before(self, turn: Turn) -> list[dict[str, str]]:
        if turn.conversation_id not in self.known:
            self.known[turn.conversation_id] = all_turns(self.session, turn.conversation_id)
        return messages(path_to(self.known[turn.conversation_id], turn.parent_id))
