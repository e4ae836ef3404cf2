"""How judgements of another program enter the store: under ids that follow from the source's own.

So what is imported again is not stored twice.
"""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from steersman.people.store.conversations import TurnText
from steersman.people.store.items import NewItem, add_item, make_queue
from steersman.people.store.judgements import store_imported
from steersman.people.store.schema import Item, JudgementRow
from steersman.types import SteersmanError

SPACE = uuid.UUID("5e4b1c5e-7a0f-4d1b-9a55-1b7e0d4f3c21")
STARS = 5
"""Steps of a scale whose export does not say how long it is."""


@dataclass(slots=True)
class ImportCounts:
    """What an import did: rows stored by task, and rows left out by reason."""

    stored: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


def source_id(*parts: Any) -> str:
    """The id of what these parts name in the other program: the same at every import."""
    return str(uuid.uuid5(SPACE, "\0".join(map(str, parts))))


def import_item(
    session: Session, name: str, task: str, prompt: Any, answers: list[TurnText], settings: dict[str, Any]
) -> Item:
    """The item of an import's queue, which nobody is asked to judge (its overlap is 0)."""
    queue = make_queue(session, f"{name} ({task})"[:100], task, overlap=0, **settings)
    digest_id = source_id(queue.name, repr(prompt), *(a.content for a in answers))
    found = session.get(Item, digest_id)
    if found is not None:
        return found
    made = add_item(session, queue, NewItem(prompt, answers, source=name), item_id=digest_id)
    if made is None:
        raise SteersmanError(f"{name}: an item is there already under another id")
    return made


def import_judgement(
    session: Session,
    done: ImportCounts,
    task: str,
    key: tuple[Any, ...],
    rater: int,
    verdict: dict[str, Any],
    source: str,
    when: float,
    **more: Any,
) -> None:
    """Stores a verdict under the id that its `key` gives, and counts it; one that is there already is left out."""
    row = JudgementRow(
        key=source_id(*key), rater_id=rater, task=task, verdict=verdict, created=when, source=source,
        sides=None, **({"seconds": None} | more),
    )  # fmt: skip
    if store_imported(session, row):
        done.stored[task] += 1
    else:
        done.left_out["there already"] += 1
