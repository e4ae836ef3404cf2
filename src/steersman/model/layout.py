"""How a batch of prompts with responses is laid out for a causal trunk, and where its states are found again.

Rows are joined (prompt, then response) and right-padded, or several are laid into one row of the trunk with
positions that start anew. Either way a row is known by the flat index of its first token, so what follows does
not care which. All of it is done on the CPU, which knows the lengths: an accelerator would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steersman.distributed.micro import micro_batches
from steersman.types import SteersmanError, Tokens, send


@dataclass(slots=True)
class Layout:
    """What the trunk reads: `ids` [R, L]; `positions` [R, L] when packed; `start` [B], where each row begins in
    the flattened ids; `row_starts` (`native.sequences.row_starts`) where attention is to keep rows apart that stand
    in one."""

    ids: Int[Tensor, "R L"]
    positions: Int[Tensor, "R L"] | None
    start: Int[Tensor, " B"]
    row_starts: Int[Tensor, "1 1 2 B+1"] | None = None


def join(tokens: Tokens) -> Layout:
    """One row of the trunk per row of the batch. Padding becomes id 0 whatever stood there."""
    require_prompts(tokens)
    prompt_length, length = tokens.prompt_length[:, None], tokens.length[:, None]
    L = int(length.max())
    column = torch.arange(L, device=tokens.prompt.device).expand(len(tokens), L)
    from_prompt = tokens.prompt.gather(1, column.clamp(max=tokens.prompt.shape[1] - 1))
    from_response = tokens.response.gather(1, (column - prompt_length).clamp(0, tokens.response.shape[1] - 1))
    ids = torch.where(column < prompt_length, from_prompt, from_response).masked_fill(column >= length, 0)
    return Layout(ids, None, torch.arange(len(tokens), device=ids.device) * L)


def require_prompts(tokens: Tokens) -> None:
    """Raises SteersmanError where a row has no prompt."""
    if (tokens.prompt_length < 1).any():
        row = int((tokens.prompt_length < 1).nonzero()[0])
        raise SteersmanError(
            f"row {row} of the batch has an empty prompt, so nothing predicts its first response token; "
            "start every prompt with at least one token, such as the tokenizer's bos or eos"
        )


def pack(tokens: Tokens, max_tokens: int) -> Layout:
    """Several rows of the batch in one row of the trunk, up to `max_tokens` or the longest one.

    Longest first, each into the first row with room. What is left over stands at position 0, token for token, so
    no position goes beyond what the model has learned.
    """
    joined = join(tokens)
    lengths = tokens.length.tolist()
    room: list[int] = []
    place = {}
    capacity = max(max_tokens, max(lengths))
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        r = next((r for r, free in enumerate(room) if free >= lengths[b]), len(room))
        if r == len(room):
            room.append(capacity)
        place[b] = (r, capacity - room[r])
        room[r] -= lengths[b]
    fill = torch.tensor([capacity - free for free in room], device=joined.ids.device)
    L = int(fill.max())
    start = torch.tensor([place[b][0] * L + place[b][1] for b in range(len(lengths))], device=fill.device)
    column = torch.arange(joined.ids.shape[1], device=fill.device).expand_as(joined.ids)
    real = column < tokens.length[:, None]
    where = (start[:, None] + column)[real]
    ids = torch.zeros(len(room), L, dtype=joined.ids.dtype, device=fill.device)
    positions = torch.zeros_like(ids)
    ids.view(-1)[where] = joined.ids[real]
    positions.view(-1)[where] = column[real]
    return Layout(ids, positions, start)


def response_slots(tokens: Tokens, extra: int = 0) -> Bool[Tensor, "B T+extra"]:
    """True at a row's response tokens and `extra` more columns after the last one."""
    column = torch.arange(tokens.response.shape[1] + extra, device=tokens.response.device)
    return column < (tokens.response_length + extra)[:, None]


def masked_indices(mask: Bool[Tensor, "*s"], device: torch.device) -> Int[Tensor, " n"]:
    """Flat indices of what a mask on the CPU marks, on the device."""
    return send(mask.flatten().nonzero()[:, 0], device)


def spread(packed: Tensor, slots: Bool[Tensor, "B W"]) -> Tensor:
    """Packed numbers back into `[B, W]`, 0 elsewhere."""
    places = masked_indices(slots, packed.device)
    return packed.new_zeros(slots.numel()).index_copy(0, places, packed).view(slots.shape)


def in_groups(
    tokens: Tokens, max_tokens: int | None, run: Callable[[Tokens], tuple[Tensor, ...]], width: int
) -> tuple[Tensor, ...]:
    """`run` over the batch; without gradients in micro-batches, put back in order in `[B, width]`."""
    groups = [] if max_tokens is None or torch.is_grad_enabled() else micro_batches(tokens.length, max_tokens)
    if len(groups) < 2:
        return run(tokens)
    out: tuple[Tensor, ...] = ()
    for rows in groups:
        parts = run(tokens.rows(rows))
        out = out or tuple(part.new_zeros(len(tokens), width) for part in parts)
        for whole_part, part in zip(out, parts, strict=True):
            whole_part[send(rows, part.device), : part.shape[1]] = part
    return out


def repeated_rows(x: Float[Tensor, "G ..."], owner: Int[Tensor, " b"]) -> Float[Tensor, "b ..."]:
    """`x[owner]`, whose gradient is the same numbers in every run: where rows repeat, torch adds up the gradients of
    `x[owner]` in whatever order threads come on a CPU, and those of `index_select` so on a GPU."""
    return x.index_select(0, owner) if x.device.type == "cpu" else x[owner]
