"""Micro-batches: which rows go through a model at once, decided by tokens and not by rows, and on which rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from steersman.distributed.ranks import ranks
from steersman.types import Tokens


def micro_batches(
    length: Int[Tensor, " B"], max_tokens: int, group: Int[Tensor, " B"] | None = None
) -> list[Int[Tensor, " b"]]:
    """Row numbers of each micro-batch, whose padded size, rows x longest, is at most `max_tokens`.

    Rows of like length go together, longest first, so that little padding is computed and memory peaks at the
    start. Rows of one `group` (the answers to one prompt) stand together, in the place of the longest of them, so
    that what they share is computed once; they are parted only where they are too many for one micro-batch. A single
    row longer than `max_tokens` has one of its own.
    """
    order, bound = length.argsort(descending=True, stable=True), length
    which = torch.arange(len(length), device=length.device)
    if group is not None:
        _, which = group.unique(return_inverse=True)
        bound = torch.zeros_like(length).scatter_reduce(0, which, length, "amax")[which]
        order = order[which[order].argsort(stable=True)]
        order = order[bound[order].argsort(descending=True, stable=True)]
    found, start, first = [], 0, _firsts(which[order])
    while start < len(order):
        end = start + max(1, max_tokens // max(int(bound[order[start]]), 1))
        if end < len(order) and first[end] > start:
            end = first[end]
        found.append(order[start:end])
        start = end
    return found


def _firsts(which: Int[Tensor, " B"]) -> list[int]:
    """For each place the first one of those around it that hold the same number."""
    _, counts = which.unique_consecutive(return_counts=True)
    return (counts.cumsum(0) - counts).repeat_interleave(counts).tolist()


def split_evenly(rows: Int[Tensor, " B"], parts: int) -> list[Int[Tensor, " b"]]:
    """The rows in `parts` consecutive groups whose sizes differ by one at most; empty groups are left out."""
    return [group for group in torch.tensor_split(rows, parts) if len(group)]


@dataclass(slots=True, frozen=True)
class Part:
    """A micro-batch of this rank: row numbers, and whether they count.

    Where every rank must make as many passes as the others (`Ranks.in_step`), a rank that has less to do goes through
    the shortest row once more, and what comes of it counts 0 times (`weight`).
    """

    rows: Int[Tensor, " b"]
    counts: bool = True

    @property
    def weight(self) -> float:
        return 1.0 if self.counts else 0.0


def my_micro_batches(
    length: Int[Tensor, " B"], max_tokens: int, group: Int[Tensor, " B"] | None = None
) -> list[Part]:
    """This rank's micro-batches; those of all ranks together hold each row once. Alone: all of them."""
    here = ranks()
    if here.world == 1:
        return [Part(rows) for rows in micro_batches(length, max_tokens, group)]
    plans = []
    for rows in share_out(length, here.world, group):
        inner = micro_batches(length[rows], max_tokens, None if group is None else group[rows]) if len(rows) else []
        plans.append([rows[part] for part in inner])
    mine = [Part(rows) for rows in plans[here.rank]]
    if here.in_step:
        idle = Part(length.argmin().reshape(1), counts=False)
        mine += [idle] * (max(map(len, plans)) - len(mine))
    return mine


def share_out(
    length: Int[Tensor, " B"], world: int, group: Int[Tensor, " B"] | None = None
) -> list[Int[Tensor, " b"]]:
    """The rows of each of `world` ranks, in order, so that the ranks have about equally many tokens to read.

    Longest first, each to the rank with the least so far. Rows of one `group` stay together where there are groups
    enough to share out evenly. A rank may get no row.
    """
    unit = torch.arange(len(length))
    if group is not None:
        _, which = group.cpu().unique(return_inverse=True)
        if int(which.max()) + 1 >= 2 * world:
            unit = which
    cost = torch.zeros(int(unit.max()) + 1, dtype=torch.long).index_add(0, unit, length.cpu().long())
    load, owner = [0] * world, [0] * len(cost)
    for at in cost.argsort(descending=True, stable=True).tolist():
        rank = load.index(min(load))
        owner[at] = rank
        load[rank] += int(cost[at])
    of_row = torch.tensor(owner)[unit]
    return [(of_row == rank).nonzero().flatten().to(length.device) for rank in range(world)]


def over_rows(
    tokens: Tokens,
    max_tokens: int,
    run: Callable[[Tokens], Tensor],
    width: int | None = None,
    group: Int[Tensor, " B"] | None = None,
) -> Tensor:
    """`run`, without gradients, on the rows of a batch, each on one rank; `[B, ...]` on every rank, in order.

    What `run` gives of some rows is `[b, ...]`; with `width` it is padded with 0 to `[b, width]`. Alone: `run` on the
    whole batch. The result is where the batch is.
    """
    if ranks().world == 1:
        return run(tokens).to(tokens.response.device)
    device, found = tokens.response.device, []
    for part in my_micro_batches(tokens.length, max_tokens, group):
        values = run(tokens.rows(part.rows))
        if width is not None:
            values = torch.nn.functional.pad(values, (0, width - values.shape[1]))
        if part.counts:
            found.append((part.rows, values))
    return in_order(found).to(device)


def in_order(found: Sequence[tuple[Int[Tensor, " b"], Tensor]], what: str = "numbers of rows") -> Tensor:
    """The values `[N, ...]` of rows that were shared out over the ranks, on the CPU, by row number."""
    mine = [(rows.cpu(), values.cpu()) for rows, values in found]
    every = [pair for of_rank in ranks().gather(mine, what) for pair in of_rank]
    return torch.cat([values for _, values in every])[torch.cat([rows for rows, _ in every]).argsort()]
