"""Encoded examples -> `Tokens`: right-padded, ends by length."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch

from steersman.data.encode import Encoded
from steersman.types import SteersmanError, Tokens


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
    """2B rows: the B chosen answers, then the B rejected ones, so that one forward does both."""
    return collate([g[0] for g in groups] + [g[1] for g in groups], pad_id)


def collate_groups(groups: Sequence[Sequence[Encoded]], pad_id: int = 0) -> tuple[Tokens, torch.Tensor]:
    """All answers of all groups, group after group, and `group` [N], the number of each row's group."""
    sizes = torch.tensor([len(g) for g in groups])
    rows = [e for g in groups for e in g]
    return collate(rows, pad_id), torch.repeat_interleave(torch.arange(len(groups)), sizes)


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows binned into blocks of at most `max_length` tokens: lists of row numbers, every row in exactly one.

    Longest rows first, each into the fullest block that still has room for it (best-fit decreasing, which
    keeps first-fit decreasing's bound of 11/9 of the fewest blocks possible, plus one). Only a plan: the
    model runs a block with positions that start anew at every row.

    Raises SteersmanError for a row longer than a block.
    """
    blocks: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, block), sorted
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[row] > max_length:
            raise SteersmanError(
                f"row {row} has {lengths[row]} tokens and can not be packed into blocks of {max_length}; "
                "raise the block or set data.max_length"
            )
        at = bisect.bisect_left(room, (lengths[row], -1))
        if at == len(room):
            blocks.append([row])
            left, block = max_length, len(blocks) - 1
        else:
            left, block = room.pop(at)
            blocks[block].append(row)
        bisect.insort(room, (left - lengths[row], block))
    return blocks
