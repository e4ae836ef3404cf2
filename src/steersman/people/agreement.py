"""How far a judge agrees with people, on judgements that nothing was trained or tuned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from steersman.judge import Judge
from steersman.people.filters import item_key, prompt_key, shares
from steersman.people.judgements import Judgement
from steersman.statistics.agreement import cohen_kappa
from steersman.statistics.estimates import Estimate, bootstrap, share

ENOUGH = 50
"""Decided items below which no agreement is stated."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Share of items on which judge and people chose the same answer (a judge's tie counts half), and Cohen's kappa.

    `items` were decided by people; where they are fewer than `needed`, both estimates are None.
    """

    items: int
    needed: int
    accuracy: Estimate | None
    kappa: Estimate | None

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.accuracy is None:
            return (
                f"is not checked against people: {self.items} of {self.needed} judgements that this needs; take the "
                "verdict for the judge's own opinion"
            )
        return f"agrees with people on {self.accuracy} of {self.items} held-out items, kappa {self.kappa}"


def agreement(judge: Judge, rows: Sequence[Judgement], *, needed: int = ENOUGH) -> Agreement:
    """Asks the judge about each pair that people decided: what is said of one prompt hangs together."""
    items: dict[str, Judgement] = {}
    for one in rows:
        if one.choice is not None and one.expected is None:
            items.setdefault(item_key(one), one)
    won = shares(rows)
    decided = [(key, one) for key, one in items.items() if won[key] != 0.5]
    if len(decided) < needed:
        return Agreement(len(decided), needed, None, None)
    asked = [(one.prompt, *sorted(one.answers)) for _, one in decided]
    told = judge.compare([(p, a, b) for p, a, b in asked])
    both = [
        (float(won[key] > 0.5), t.share, prompt_key(one.prompt))
        for (key, one), t in zip(decided, told, strict=True)
        if t
    ]
    if len(both) < needed:
        return Agreement(len(both), needed, None, None)
    people, judged = (np.array([row[i] for row in both], float) for i in (0, 1))
    _, prompts = np.unique([row[2] for row in both], return_inverse=True)
    kappa = bootstrap(cohen_kappa, [people, judged], clusters=prompts)
    return Agreement(len(both), needed, share(1 - np.abs(people - judged), prompts), kappa)
