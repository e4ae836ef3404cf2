"""Numbers of many answers at once, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.data import Encoded, collate
from steersman.run.micro import in_order, my_micro_batches
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
