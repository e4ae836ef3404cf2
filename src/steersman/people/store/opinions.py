"""The judgements that count, each with what it was about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session

from steersman.data.config import CountingConfig
from steersman.people.store.conversations import all_turns, messages, path_to
from steersman.people.store.database import pieces
from steersman.people.store.items import CHAT
from steersman.people.store.judgements import live
from steersman.people.store.schema import CUT, Answer, Item, JudgementRow, Model, Queue, Rater, Turn
from steersman.people.store.verdicts import Verdict, agrees

AT_ONCE = 500
"""Judgements whose texts are in memory at a time."""


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model that answered: its name and the version of its weights; both empty where nobody knows."""

    name: str = ""
    version: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one rater said of one item or turn.

    `subject` is the id of that item or turn, `prompt` text or messages, `answers` and `models` go by the numbers that
    the verdict uses; `cut` says which answers are known to be cut by the limit on their length. `sides` are these
    numbers in the order of the screen, none where nobody knows it.
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
    models: list[ModelName]
    cut: list[bool]
    created: float
    seconds: float | None
    sides: list[int]


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


def everything(session: Session, *, gold: bool = False, texts: bool = True) -> Iterator[Opinion]:
    """Every live judgement, skips too, of items without a known verdict, or of those with one; the oldest first.
    Without `texts` prompts, answers and models are left empty, which takes a small part of the time."""
    return _read(session, _live(gold).order_by(JudgementRow.id), texts)


def newest(session: Session, *, task: str = "", rater: str = "") -> Iterator[Opinion]:
    """The live judgements of `everything`, the newest first, of one task or rater where asked; read as they are
    taken."""
    return _read(session, _of(task, rater).order_by(JudgementRow.id.desc()), texts=True)


def count(session: Session, *, task: str = "", rater: str = "") -> int:
    """How many judgements `newest` has."""
    return session.scalar(select(func.count()).select_from(_of(task, rater).subquery())) or 0


def _live(gold: bool) -> Select[JudgementRow, str, str]:
    """Rows (number, pseudonym, name of the queue), and what they name, without texts."""
    known = Item.gold.is_not(None) if gold else Item.gold.is_(None)
    return (
        select(JudgementRow, Rater.pseudonym, Queue.name.label("queue"))
        .join(Rater, Rater.id == JudgementRow.rater_id)
        .outerjoin(Item, Item.id == JudgementRow.item_id)
        .outerjoin(Queue, Queue.id == Item.queue_id)
        .where(live(), known, or_(JudgementRow.item_id.is_not(None), JudgementRow.turn_id.is_not(None)))
    )


def _of(task: str, rater: str) -> Select[JudgementRow, str, str]:
    found = _live(gold=False)
    found = found.where(JudgementRow.task == task) if task else found
    return found.where(Rater.pseudonym == rater) if rater else found


def _read(session: Session, found: Select[JudgementRow, str, str], texts: bool) -> Iterator[Opinion]:
    """The opinions of the rows, with the texts that they are about read piece by piece."""
    about = _Texts(session)
    for piece in pieces(session.execute(found.execution_options(yield_per=AT_ONCE)), AT_ONCE):
        if texts:
            about.load([row for row, _, _ in piece])
        for row, rater, queue in piece:
            what = about.of(row) if texts else ("", [], [], [])
            yield Opinion(
                row.id, row.task, rater, 1.0, row.verdict, str(row.item_id or row.turn_id), queue or CHAT, *what,
                row.created, row.seconds, row.sides or [],
            )  # fmt: skip


def gold_results(session: Session) -> dict[str, list[bool]]:
    """For each rater, which gold items they got right, in order; a skipped one is wrong."""
    known = dict(session.execute(select(Item.id, Item.gold).where(Item.gold.is_not(None))).tuples().all())
    right: dict[str, list[bool]] = defaultdict(list)
    for one in everything(session, gold=True, texts=False):
        right[one.rater].append(agrees(one.task, known[one.subject] or {}, one.verdict))
    return dict(right)


def model_names(session: Session) -> dict[int | None, ModelName]:
    """Every model by its number, and the unknown one under None."""
    return {None: ModelName(), **{m.id: ModelName(m.name, m.version) for m in session.scalars(select(Model))}}


class _Texts:
    """What judgements are about: prompt, answers and models, read for many at once, each conversation once."""

    def __init__(self, session: Session) -> None:
        self.session, self.models = session, model_names(session)
        self.conversations: dict[str, dict[str, Turn]] = {}

    def load(self, rows: list[JudgementRow]) -> None:
        """Reads the items, answers and turns that these judgements name, in the place of those before."""
        items, turns = {row.item_id for row in rows} - {None}, {row.turn_id for row in rows} - {None}
        read = self.session.scalars
        self.prompts = {item.id: item.prompt for item in read(select(Item).where(Item.id.in_(items)))}
        self.turns = {turn.id: turn for turn in read(select(Turn).where(Turn.id.in_(turns)))}
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        for answer in read(select(Answer).where(Answer.item_id.in_(items)).order_by(Answer.item_id, Answer.number)):
            self.answers[answer.item_id].append(answer)

    def of(self, row: JudgementRow) -> tuple[Any, list[str], list[ModelName], list[bool]]:
        """Prompt, answers, models, and which answers were cut."""
        answers: list[Answer] | list[Turn]
        if row.item_id is not None:
            prompt, answers = self.prompts[row.item_id], self.answers[row.item_id]
        else:
            turn = self.turns[str(row.turn_id)]
            prompt, answers = self._before(turn), [turn]
        models = [self.models[a.model_id] for a in answers]
        return prompt, [a.content for a in answers], models, [a.finish == CUT for a in answers]

    def _before(self, turn: Turn) -> list[dict[str, str]]:
        if turn.conversation_id not in self.conversations:
            self.conversations[turn.conversation_id] = all_turns(self.session, turn.conversation_id)
        return messages(path_to(self.conversations[turn.conversation_id], turn.parent_id))
