"""Judgements -> rows in the shapes that the data room knows (docs/data-formats.md).

Of several raters one row is made per item (`combine: raters`): a pair's `votes`, and the share of their weight as its
`agreement`; thumbs by the majority of weight, for each answer of a comparison too, even splits left out; the mean
rank; the mean rating. A row's `weight` is the mean weight of the raters behind it. With `combine: each` every
judgement is a row of its own.

What each verdict is worth:

    compare   a pair; a tie and "both bad" are half a vote. A thumb for each answer: up where it is the better one,
              down where it is the worse one or both are bad; a tie is half a thumb up
    rank      a ranking; for pairs, all its pairs of unequal rank, and for thumbs these pairs, split in two
    rate      a rating
    thumb     a thumb; where the majority is up, and one of it without a correction: a demonstration
    review    as a thumb: accepted is up
    correction (of a thumb or review)   a demonstration, and a pair: better than the answer that it corrects

Every row rests on the judgements of its own subject alone, whatever else the store holds; only where a rater gave an
answer a thumb and compared it as well, as one click in Open WebUI does, the thumb alone counts as one.

Where an answer is known to be cut by the limit on its length, its end is none to be learned: it makes no
demonstration, no thumb up and no pair with another answer, and is left out of rankings.
"""

from __future__ import annotations

from collections import Counter, defaultdict
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
CUT_END = "with an answer that the length limit cut, whose end they would teach"
EVEN = "with an answer whose raters are evenly split"
THUMBS = "thumbs and reviews"
SPLIT = ("comparisons", 'comparisons with "both bad"', "rankings")
"""Where thumbs come from that nobody gave as such."""


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
        """Rows that give examples of the kind; says how many thumbs come from what, and what was left out.

        Raises SteersmanError where the store has nothing for it.
        """
        if want == "query":
            made: Made = enumerate(self._prompts(), 1)
        elif want in MADE:
            made = MADE[want](self._opinions(config), config.combine == "each")
        else:
            raise SteersmanError(f"{self.url}: no judgement here labels {want}")
        given, left_out = Counter[str](), Counter[str]()
        for number, data in made:
            source, why = data.pop("source", ""), data.pop("left_out", "")
            if why:
                left_out[why] += 1
                continue
            given[source] += 1
            yield Row(data, self.url, number, "judgement" if want != "query" else "prompt")
        told = f"left out of the {want} rows: {', '.join(f'{n} {why}' for why, n in left_out.items())}"
        if not given:
            raise SteersmanError(
                f"{self.url}: it holds nothing that gives {want} rows under data.judgements; "
                f"what it has: {', '.join(self.kinds(config)) or 'no judgement'}{f'; {told}' if left_out else ''}"
            )
        if set(given) & set(SPLIT):
            say(f"{self.url}: the {want} rows: {', '.join(f'{n} from {source}' for source, n in given.items())}")
        if left_out:
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
    yield from _ranked_pairs(found, each)
    for one in found:
        right = one.verdict.get("correction")
        if right and not _same(right, one.answers[0]):
            yield one.number, _about([one]) | {"chosen": right, "rejected": one.answers[0]}


def _ranked_pairs(found: list[Opinion], each: bool) -> Made:
    for group in _groups(found, "rank", each):
        ranks = _ranks(group)
        for i, j in combinations(sorted(range(len(ranks)), key=ranks.__getitem__), 2):
            if ranks[i] < ranks[j] and not _same(group[0].answers[i], group[0].answers[j]):
                yield group[0].number, _pair(group, i, j)


def _pair(group: list[Opinion], better: int, worse: int) -> Data:
    one = group[0]
    data = _about(group) | {"chosen": one.answers[better], "rejected": one.answers[worse]}
    cut = one.cut[better] or one.cut[worse]
    return data | {"models": [_models(group)[i] for i in (better, worse)], "left_out": CUT_END if cut else ""}


def _thumbs(found: list[Opinion], each: bool) -> Made:
    for group, share in _shares_up(found, each):
        yield group[0].number, _thumb(group, 0, share) | {"source": THUMBS}
    given = {(o.rater, repr(o.prompt), o.answers[0]) for o in found if o.task in TASKS["feedback"]}
    for group in _groups(found, "compare", each):
        one = group[0]
        shares = [_mean(group, lambda o, i=i: _up(o, i)) for i in (0, 1)]
        both_bad = max(shares) < 0.5
        for i in sorted((0, 1), key=lambda i: -shares[i]):
            told = [o for o in group if (o.rater, repr(o.prompt), o.answers[i]) not in given]
            if told and one.answers[i].strip():
                data = _thumb(told, i, _mean(told, lambda o, i=i: _up(o, i)))
                why = CUT_END if any(one.cut) and not both_bad else data["left_out"]
                yield one.number, data | {"source": SPLIT[both_bad], "left_out": why}
    for number, data in _ranked_pairs(found, each):
        kept = {name: data[name] for name in ("prompt", "weight", "item", "raters", "left_out")}
        for completion, label, model in zip(
            (data["chosen"], data["rejected"]), (True, False), data["models"], strict=True
        ):
            answer = {"completion": completion, "label": label, "models": [model]}
            yield number, kept | answer | {"source": SPLIT[2]}


def _up(one: Opinion, number: int) -> float:
    """How far a comparison is a thumb up for the answer of this number; of two equal answers none is the better."""
    choice = one.verdict["choice"]
    if choice == "both_bad":
        return 0.0
    return 0.5 if choice == "tie" or _same(one.answers[0], one.answers[1]) else float(choice == number)


def _rankings(found: list[Opinion], each: bool) -> Made:
    for group in _groups(found, "rank", each):
        whole = [i for i, cut in enumerate(group[0].cut) if not cut]
        columns = {"responses": group[0].answers, "ranks": _ranks(group), "models": _models(group)}
        kept = {name: [column[i] for i in whole] for name, column in columns.items()}
        yield group[0].number, _about(group) | kept | {"left_out": CUT_END if len(whole) < 2 else ""}


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
    for group, share in _shares_up(found, each):
        if share > 0.5 and any(_is_up(o) and not o.verdict.get("correction") for o in group):
            data = _about(group) | {"completion": group[0].answers[0], "models": _models(group)}
            yield group[0].number, data | {"left_out": CUT_END if group[0].cut[0] else ""}


def _shares_up(found: list[Opinion], each: bool) -> Iterator[tuple[list[Opinion], float]]:
    """The thumbs and reviews of each answer, with the share of their weight that is up."""
    for task in ("thumb", "review"):
        for group in _groups(found, task, each):
            if group[0].answers[0].strip():
                yield group, _mean(group, lambda o: float(_is_up(o)))


def _is_up(one: Opinion) -> bool:
    return one.verdict["up" if one.task == "thumb" else "accept"]


def _thumb(group: list[Opinion], number: int, share: float) -> Data:
    """The thumb that a share of weight is for the answer of this number; left out where it is neither up nor down,
    and where it would praise a cut end."""
    why = EVEN if share == 0.5 else CUT_END if share > 0.5 and group[0].cut[number] else ""
    answer = {"completion": group[0].answers[number], "label": share > 0.5, "models": [_models(group)[number]]}
    return _about(group) | answer | {"left_out": why}


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
