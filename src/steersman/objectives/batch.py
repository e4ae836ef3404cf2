"""Numbers of many answers at once, without gradients, and whose lead is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.data import Encoded, Feedback, Preference, collate
from steersman.distributed.micro import in_order, my_micro_batches
from steersman.types import Tokens


@torch.no_grad()
def over_answers(groups: Sequence[Sequence[Encoded]], micro_tokens: int, run: Callable[[Tokens], Tensor]) -> Tensor:
    """`run` on every answer of every group, in batches of like length; `[N, ...]` in order, on the CPU.

    An answer that stands in several groups (as in all pairs of a ranking) runs once.
    """
    known = [(*e.prompt, -1, *e.response) for group in groups for e in group]
    once = dict(zip(known, (e for group in groups for e in group), strict=True))
    place = {key: i for i, key in enumerate(once)}
    answers = list(once.values())
    found = []
    for part in my_micro_batches(torch.tensor([len(e) for e in answers]), micro_tokens):
        numbers = run(collate([answers[i] for i in part.rows.tolist()])).float().cpu()
        if part.counts:
            found.append((part.rows, numbers))
    return in_order(found)[[place[key] for key in known]]


def scores_of(model: Any, groups: Sequence[Sequence[Encoded]], micro_tokens: int) -> Tensor:
    """The reward model's score of every answer, `[N]`."""
    return over_answers(groups, micro_tokens, model.score)


def weight_of(examples: Sequence[Preference] | Sequence[Feedback], rows: Sequence[int]) -> float:
    """The sum of the rows' weights, by which a batch's weighed losses are divided. Where all weigh nothing it is 1:
    such a batch teaches nothing."""
    return sum(examples[i].weight for i in rows) or 1.0


def majority(agreement: Tensor) -> Tensor:
    """Which answer of each pair most raters preferred: 1 the first one, -1 the second one, 0 where they are evenly
    split."""
    return (agreement - 0.5).sign()


def right(lead: Tensor, target: Tensor | None = None, tie: Tensor | float = 0.0) -> Tensor:
    """1 where the lead is on the side that most raters are on (`target` above or below 1/2; the first side without
    it), 1/2 for a lead of at most `tie`, 0 where raters are split or the lead is on the other side."""
    side = torch.ones_like(lead) if target is None else majority(target)
    even = lead.abs() <= tie
    return torch.where(even, 0.5, (lead * side > 0).float()) * (side != 0)


def rounding(logp: Tensor) -> Tensor:
    """The lead that is rounding: at the start policy and reference are the same, and their log-probabilities `logp`
    (nats) equal but for the last bits."""
    return 1e-6 * logp.abs().clamp(min=1)
