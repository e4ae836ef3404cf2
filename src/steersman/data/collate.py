"""Encoded examples -> `Tokens`: right-padded, ends by length."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steersman.data.encode import Encoded
from steersman.types import Tokens


def collate(batch: Sequence[Encoded], pad_id: int = 0) -> Tokens:
    """One row per example, right-padded with `pad_id`; what stands in the padding is never read."""
    P = max(len(e.prompt) for e in batch)
    T = max(1, *(len(e.response) for e in batch))
    prompt = torch.full((len(batch), P), pad_id, dtype=torch.long)
    response = torch.full((len(batch), T), pad_id, dtype=torch.long)
    mask = torch.zeros(len(batch), T, dtype=torch.bool)
    for b, e in enumerate(batch):
        prompt[b, : len(e.prompt)] = torch.tensor(e.prompt, dtype=torch.long)
        response[b, : len(e.response)] = torch.tensor(e.response, dtype=torch.long)
        mask[b, : len(e.mask)] = torch.tensor(e.mask, dtype=torch.bool)
    return Tokens(
        prompt,
        torch.tensor([len(e.prompt) for e in batch]),
        response,
        torch.tensor([len(e.response) for e in batch]),
        mask,
    )


def collate_pairs(groups: Sequence[Sequence[Encoded]], pad_id: int = 0) -> Tokens:
    """2B rows: the B chosen answers, then the B rejected ones, so that one forward does both; then, where the groups
    have a third answer, the B third ones."""
    return collate([g[place] for place in range(len(groups[0])) for g in groups], pad_id)


def collate_groups(groups: Sequence[Sequence[Encoded]], pad_id: int = 0) -> tuple[Tokens, torch.Tensor]:
    """All answers of all groups, group after group, and `group` [N], the number of each row's group."""
    sizes = torch.tensor([len(g) for g in groups])
    rows = [e for g in groups for e in g]
    return collate(rows, pad_id), torch.repeat_interleave(torch.arange(len(groups)), sizes)
