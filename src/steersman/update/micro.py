"""Micro-batches: how many rows go through a model at once, decided by tokens and not by rows."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def micro_batches(
    length: Int[Tensor, " B"], max_tokens: int, group: Int[Tensor, " B"] | None = None
) -> list[Int[Tensor, " b"]]:
    """Row numbers in groups whose padded size, rows x longest, is at most `max_tokens`.

    Rows of like length go together, longest first, so that little padding is computed and memory peaks at the
    start. Rows of one `group` (the answers to one prompt) stand together, in the place of the longest of them, so
    that what they share is computed once. A single row longer than `max_tokens` is a group of its own.
    """
    order, bound = length.argsort(descending=True, stable=True), length
    if group is not None:
        _, which = group.unique(return_inverse=True)
        bound = torch.zeros_like(length).scatter_reduce(0, which, length, "amax")[which]
        order = order[which[order].argsort(stable=True)]
        order = order[bound[order].argsort(descending=True, stable=True)]
    groups, start = [], 0
    while start < len(order):
        rows = max(1, max_tokens // max(int(bound[order[start]]), 1))
        groups.append(order[start : start + rows])
        start += rows
    return groups


def split_evenly(rows: Int[Tensor, " B"], parts: int) -> list[Int[Tensor, " b"]]:
    """The rows in `parts` consecutive groups whose sizes differ by one at most; empty groups are left out."""
    return [group for group in torch.tensor_split(rows, parts) if len(group)]
