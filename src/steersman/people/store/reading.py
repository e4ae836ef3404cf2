"""Judgements -> rows in the shapes that the data room knows (docs/data-formats.md).

Of several raters one row is made per item (`combine: raters`): a pair's `votes`, and the share of their weight as its
`agreement`; thumbs by the majority of weight, even splits left out; the mean rank; the mean rating. A row's `weight`
is the mean weight of the raters behind it. With `combine: each` every judgement is a row of its own.

What each verdict is worth:

    compare   a pair; a tie and "both bad" are half a vote, and "both bad" is a thumb down for both answers
    rank      a ranking; for pairs, all its pairs of unequal rank
    rate      a rating
    thumb     a thumb; where the majority is up, and one of it without a correction: a demonstration
    review    as a thumb: accepted is up
    correction (of a thumb or review)   a demonstration, and a pair: better than the answer that it corrects

Where an answer is known to be cut by the limit on its length, its end is none to be learned: it makes no
demonstration, no thumb up and no pair with another answer, and is left out of rankings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import aliased

from steersman.data.config import CountingConfig
from steersman.data.rows import Row
from steersman.data.shapes import Kind
from steersman.guards.terminal import say
from steersman.people.store.conversations import messages
from steersman.people.store.database import read_store
from steersman.people.store.opinions import Opinion, opinions
from steersman.people.store.schema import Item, Turn
from steersman.types import SteersmanError

Data = dict[str, Any]
Made = Iterator[tuple[int, Data]]
"""Rows with the number of the judgement that they come from (of several, the first)."""
TASKS: dict[Kind, tuple[str, ...]] = {
    "preference": ("compare",),
    "ranking": ("rank",),
    "rating": ("rate",),
    "feedback": ("thumb", "review"),
    "demonstration": ("thumb", "review"),
}
CHOICE = {0: 1.0, 1: 0.0, "tie": 0.5, "both_bad": 0.5}
"""A comparison as a vote for answer 0."""


class StoredRows:
    """The rows of the store at an address; each reading is one snapshot of it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def kinds(self, config: CountingConfig) -> list[Kind]:
        """The kinds that there are judgements for, the one with the most first."""
        told = [o.task for o in self._opinions(config)]
        counts: dict[Kind, int] = {kind: sum(task in tasks for task in told) for kind, tasks in TASKS.items()}
        return sorted([k for k in counts if counts[k]], key=lambda k: -counts[k])

    def rows(self, want: Kind, config: CountingConfig) -> Iterator[Row]:
        """Rows that give examples of the kind. Thumbs come from pairs, split in two, where the store has no thumb.

        Raises SteersmanError where the store has nothing for it.
        """
        if want == "query":
            made: Made = enumerate(self._prompts(), 1)
        else:
            found = self._opinions(config)
            if want not in MADE:
                raise SteersmanError(f"{self.url}: no judgement here labels {want}")
            made = MADE[want](found, config.combine == "each")
            if want == "feedback" and not any(o.task in TASKS["feedback"] for o in found):
                pairs = _pairs(found, config.combine == "each")
                made = ((number, data) for number, data in pairs if data.get("agreement") != 0.5)
        empty, cut = True, 0
        for number, data in made:
            if data.pop("cut", False):
                cut += 1
                continue
            empty = False
            yield Row(data, self.url, number, "judgement" if want != "query" else "prompt")
        told = (
            f"left out of the {want} rows: {cut} with an answer that the length limit cut, whose end they would teach"
        )
        if empty:
            raise SteersmanError(
                f"{self.url}: it holds nothing that gives {want} rows under data.judgements; "
                f"what it has: {', '.join(self.kinds(config)) or 'no judgement'}{f'; {told}' if cut else ''}"
            )
        if cut:
            say(f"{self.url}: {told}")

    def _opinions(self, config: CountingConfig) -> list[Opinion]:
        with read_store(self.url) as session:
            return opinions(session, config)

    def _prompts(self) -> Iterator[Data]:
        """Every item's prompt, and every conversation up to its user's first turn, once."""
        with read_store(self.url) as session:
            items = session.scalars(
                select(Item.prompt).where(Item.conversation_id.is_(None)).order_by(Item.queue_id, Item.position)
            )
            found: list[Any] = list(items)
            above = aliased(Turn)
            begun = (
                select(Turn, above)
                .outerjoin(above, above.id == Turn.parent_id)
                .where(Turn.role == "user", above.parent_id.is_(None))
                .where(or_(above.id.is_(None), above.role == "system"))
                .order_by(Turn.created)
            )
            found += [messages([*([system] if system else []), turn]) for turn, system in session.execute(begun)]
        yield from ({"prompt": prompt} for prompt in {repr(p): p for p in found}.values())


def _groups(found: Iterable[Opinion], task: str, each: bool) -> Iterator[list[Opinion]]:
    """The opinions on one subject together, or each alone."""
    groups: dict[Any, list[Opinion]] = defaultdict(list)
    for one in found:
        if one.task == task:
            groups[one.number if each else one.subject].append(one)
    yield from groups.values()


def _pairs(found: list[Opinion], each: bool) -> Made:
    for group in _groups(found, "compare", each):
        votes = [CHOICE[o.verdict["choice"]] for o in group]
        if _same(group[0].answers[0], group[0].answers[1]):
            continue
        share = _mean(group, lambda o: CHOICE[o.verdict["choice"]])
        better = 0 if share >= 0.5 else 1
        if better:
            share, votes = 1 - share, [1 - v for v in votes]
        yield group[0].number, _pair(group, better, 1 - better) | {"agreement": share, "votes": votes}
    for group in _groups(found, "rank", each):
        ranks = _ranks(group)
        for i, j in combinations(sorted(range(len(ranks)), key=ranks.__getitem__), 2):
            if ranks[i] < ranks[j] and not _same(group[0].answers[i], group[0].answers[j]):
                yield group[0].number, _pair(group, i, j)
    for one in found:
        right = one.verdict.get("correction")
        if right and not _same(right, one.answers[0]):
            yield one.number, _about([one]) | {"chosen": right, "rejected": one.answers[0]}


def _pair(group: list[Opinion], better: int, worse: int) -> Data:
    one = group[0]
    data = _about(group) | {"chosen": one.answers[better], "rejected": one.answers[worse]}
    return data | {"models": [_models(group)[i] for i in (better, worse)], "cut": one.cut[better] or one.cut[worse]}


def _thumbs(found: list[Opinion], each: bool) -> Made:
    for group, up in _majorities(found, each):
        yield group[0].number, _answer(group) | {"label": up, "cut": up and group[0].cut[0]}
    for group in _groups(found, "compare", each):
        if _mean(group, lambda o: float(o.verdict["choice"] == "both_bad")) > 0.5:
            for answer, model in zip(group[0].answers, _models(group), strict=True):
                if answer.strip():
                    yield group[0].number, _about(group) | {"completion": answer, "label": False, "models": [model]}


def _rankings(found: list[Opinion], each: bool) -> Made:
    for group in _groups(found, "rank", each):
        whole = [i for i, cut in enumerate(group[0].cut) if not cut]
        columns = {"responses": group[0].answers, "ranks": _ranks(group), "models": _models(group)}
        kept = {name: [column[i] for i in whole] for name, column in columns.items()}
        yield group[0].number, _about(group) | kept | {"cut": len(whole) < 2}


def _ratings(found: list[Opinion], each: bool) -> Made:
    for group in _groups(found, "rate", each):
        names = dict.fromkeys(name for o in group for name in o.verdict["scores"])
        scores = {}
        for name in names:
            rated = [o for o in group if name in o.verdict["scores"]]
            scores[name] = _mean(rated, lambda o, name=name: float(o.verdict["scores"][name]))
        data = _about(group) | {"completion": group[0].answers[0], "scores": scores, "models": _models(group)}
        yield group[0].number, data


def _demonstrations(found: list[Opinion], each: bool) -> Made:
    for one in found:
        if one.verdict.get("correction"):
            yield one.number, _about([one]) | {"completion": one.verdict["correction"], "models": [""]}
    for group, up in _majorities(found, each):
        if up and any(_is_up(o) and not o.verdict.get("correction") for o in group):
            yield group[0].number, _answer(group) | {"cut": group[0].cut[0]}


def _majorities(found: list[Opinion], each: bool) -> Iterator[tuple[list[Opinion], bool]]:
    """The thumbs and reviews of each answer, with whether most of their weight is up; none of even splits."""
    for task in ("thumb", "review"):
        for group in _groups(found, task, each):
            share = _mean(group, lambda o: float(_is_up(o)))
            if share != 0.5 and group[0].answers[0].strip():
                yield group, share > 0.5


def _is_up(one: Opinion) -> bool:
    return one.verdict["up" if one.task == "thumb" else "accept"]


def _answer(group: list[Opinion]) -> Data:
    return _about(group) | {"completion": group[0].answers[0], "models": _models(group)}


MADE: dict[Kind, Callable[[list[Opinion], bool], Made]] = {
    "preference": _pairs, "feedback": _thumbs, "ranking": _rankings, "rating": _ratings,
    "demonstration": _demonstrations,
}  # fmt: skip


def _models(group: list[Opinion]) -> list[str]:
    return [str(model) for model in group[0].models]


def _about(group: list[Opinion]) -> Data:
    one = group[0]
    weight = sum(o.weight for o in group) / len(group)
    return {"prompt": one.prompt, "weight": weight, "item": one.subject, "raters": [o.rater for o in group]}


def _mean(group: list[Opinion], value: Callable[[Opinion], float]) -> float:
    return sum(o.weight * value(o) for o in group) / sum(o.weight for o in group)


def _ranks(group: list[Opinion]) -> list[float]:
    return [_mean(group, lambda o, i=i: float(o.verdict["ranks"][i])) for i in range(len(group[0].answers))]


def _same(a: str, b: str) -> bool:
    return a.strip() == b.strip() or not a.strip() or not b.strip()
