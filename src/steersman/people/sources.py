"""Where judgements are read from: files, or the store at an address."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import select

from steersman.data import BadRows
from steersman.data.read import local_files
from steersman.people.judgements import Choice, Judgement, JudgementFiles, Judgements, in_order
from steersman.people.store.database import read_store
from steersman.people.store.opinions import ModelName, Opinion, everything, newest_thumbs
from steersman.people.store.schema import Item
from steersman.people.store.verdicts import Verdict

LABEL = {"thumb": "up", "review": "accept"}


class StoredJudgements:
    """The comparisons, thumbs and reviews of a store, gold items among them; each reading is one snapshot.

    Choices go by an answer's number, not by the side on which it was shown. A model goes by its name, with its
    version (`name@version`) where the store holds judgements of several versions of this name. Of the thumbs of one
    rater for one turn only the newest is read.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __iter__(self) -> Iterator[Judgement]:
        with read_store(self.url) as session:
            told = [one for one in newest_thumbs(everything(session)) if _counts(one)]
            told += [one for one in everything(session, gold=True) if _counts(one)]
            golds = dict(session.execute(select(Item.id, Item.gold).where(Item.gold.is_not(None))).tuples().all())
        names = _names(told)
        yield from in_order(_judgement(one, names, golds.get(one.subject)) for one in told)


def open_judgements(place: str, bad: BadRows | None = None) -> Judgements:
    """The judgements of a file or folder, or of a store (`sqlite:///FILE`, `postgresql://HOST/NAME`)."""
    return StoredJudgements(place) if "://" in place else JudgementFiles(place, bad)


def half_written(place: str) -> Path | None:
    """The first JSONL file of a file or folder whose last line has no line end yet and is no whole JSON."""
    for file in local_files(place) or []:
        last = b"\n"
        if file.name.lower().endswith((".jsonl", ".ndjson")):
            with file.open("rb") as lines:
                last = next(iter(deque(lines, maxlen=1)), last)
        try:
            whole = last.endswith(b"\n") or json.loads(last) is not None
        except ValueError:
            whole = False
        if not whole:
            return file
    return None


def _counts(one: Opinion) -> bool:
    return "skip" not in one.verdict and (one.task in LABEL or one.task == "compare")


def _names(found: list[Opinion]) -> dict[ModelName, str]:
    """What each model is called among the others."""
    models = {model for one in found for model in one.models}
    versions = Counter(model.name for model in models)
    return {model: model.name if versions[model.name] == 1 else str(model) for model in models}


def _judgement(one: Opinion, names: dict[ModelName, str], gold: Verdict | None) -> Judgement:
    pair = one.task == "compare"
    return Judgement(
        id=str(one.number), user=one.rater, time=one.created, prompt=one.prompt, answers=tuple(one.answers),
        models=tuple(names[m] for m in one.models) if all(m.name for m in one.models) else (),
        choice=_choice(one.verdict) if pair else None, label=None if pair else bool(one.verdict[LABEL[one.task]]),
        reasons=tuple(one.verdict.get("reasons", ())), correction=str(one.verdict.get("correction", "")),
        seconds=one.seconds,
        expected=None if gold is None else _choice(gold) if pair else bool(gold[LABEL[one.task]]),
        sides=tuple(one.sides) if pair else (), cut=any(one.cut),
    )  # fmt: skip


def _choice(verdict: Verdict) -> Choice:
    said: dict[object, Choice] = {0: "first", 1: "second", "tie": "tie", "both_bad": "both_bad"}
    return said[verdict["choice"]]
