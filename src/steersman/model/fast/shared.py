"""A batch read with as few tokens as there are: rows of like length together, a prompt that several rows share once.

Both give what one padded batch gives, up to rounding; a test holds them to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from steersman.model.fast.apart import longest_seen
from steersman.model.fast.narrow import narrowed
from steersman.model.layout import join, masked_indices, repeated_rows, require_prompts
from steersman.model.modes import checkpointed
from steersman.model.probe import cache_argument, close, device_of, quiet
from steersman.model.prompt_layer import PromptLayer
from steersman.types import Tokens, send

CALL_COST_TOKENS = {"cpu": 64, "accelerator": 2048}
"""What one more run of the trunk costs, in tokens' worth of work: so much padding it must save."""


Part = tuple[Int[Tensor, " b"], Float[Tensor, "n H"], Int[Tensor, " b"]]
"""Rows of a batch, their states, and where among these each row's first one is; its others follow."""
ReadShared = Callable[[nn.Module, Tokens, Tensor, Tensor], list[Part]]
"""A trunk's states of a batch, each prompt read once; given are a row with each prompt and each row's prompt."""


def call_cost(device: torch.device) -> int:
    return CALL_COST_TOKENS["cpu" if device.type == "cpu" else "accelerator"]


def like_lengths(length: Int[Tensor, " B"], cost: int) -> list[Int[Tensor, " b"]]:
    """Rows in the groups of like length that make rows x longest + `cost`, summed over groups, least; longest first.

    Exact: sorted by length, the best groups are consecutive, and rows of one length stay together.
    """
    order = length.argsort(descending=True, stable=True)
    sizes, counts = torch.unique_consecutive(length[order], return_counts=True)
    size, row = sizes.tolist(), [0, *counts.cumsum(0).tolist()]
    best, cut = [0], [0]
    for end in range(1, len(size) + 1):
        totals = [best[begin] + (row[end] - row[begin]) * size[begin] + cost for begin in range(end)]
        begin = min(range(end), key=totals.__getitem__)
        best.append(totals[begin])
        cut.append(begin)
    groups, end = [], len(size)
    while end:
        groups.append(order[row[cut[end]] : row[end]].sort().values)
        end = cut[end]
    return groups[::-1]


def shared_prompts(tokens: Tokens) -> tuple[Int[Tensor, " G"], Int[Tensor, " B"]]:
    """The first row of each different prompt, and for every row which of these prompts it has."""
    column = torch.arange(tokens.prompt.shape[1], device=tokens.prompt.device)
    known = tokens.prompt.masked_fill(column >= tokens.prompt_length[:, None], -1)
    once, which = torch.unique(known, dim=0, return_inverse=True)
    rows = torch.arange(len(tokens), device=which.device)
    first = rows.new_full((len(once),), len(tokens)).scatter_reduce(0, which, rows, "amin")
    return first, which


def saved_tokens(tokens: Tokens, first: Int[Tensor, " G"]) -> int:
    """Tokens that need not be read when each different prompt is read once, padded to the longest."""
    return int(tokens.prompt_length.sum()) - len(first) * int(tokens.prompt_length.max())


def read_shared(
    trunk: nn.Module,
    tokens: Tokens,
    first: Int[Tensor, " G"],
    which: Int[Tensor, " B"],
    cost: int,
    *,
    ends: bool = False,
    part: nn.Module | None = None,
) -> list[Part]:
    """Groups of rows with their states before each response token and after the last one.

    The different prompts are read first; the responses then look at the keys and values of their prompts. With `ends`
    only the states before the response and after its last token need be right; `part` is what may be narrowed to
    those that need be. Under gradient checkpointing the prompts' keys and values stay, and all else is made again.
    """
    require_prompts(tokens)
    device, length = device_of(trunk), tokens.prompt_length[first]
    prompts = tokens.prompt[first, : int(length.max())]
    column = torch.arange(prompts.shape[1])
    real = column < length[:, None]
    memory, cache_name = DynamicCache(), cache_argument(type(trunk))
    memory.layer_class_to_replicate = PromptLayer
    ids = prompts.masked_fill(~real, 0)
    places = send(torch.arange(len(first)) * prompts.shape[1] + length - 1, device)
    with narrowed(part, places, ids.numel()), checkpoints_with_memory(trunk):
        states = trunk(input_ids=send(ids, device), use_cache=False, **{cache_name: memory}).last_hidden_state
    last = states.flatten(0, 1)[places]
    parts = []
    for rows in like_lengths(tokens.response_length, cost):
        some = tokens.rows(rows)
        prompt, P = which[rows], some.prompt.shape[1]
        cache, owner = DynamicCache(), send(prompt, device)
        layers: Any = memory.layers
        cache.layers.extend(BehindPrompt(layer, owner, P) for layer in layers)
        T = some.response.shape[1]
        step = torch.arange(T)
        there = step < some.response_length[:, None]
        ids = some.response.masked_fill(~there, 0)
        seen = torch.cat([real[prompt, :P], real.new_ones(len(rows), T)], 1)
        read = step == some.response_length[:, None] - 1 if ends else there
        with narrowed(part, masked_indices(read, device), ids.numel()), checkpoints_with_memory(trunk):
            states = trunk(
                input_ids=send(ids, device), use_cache=False, attention_mask=send(seen.long(), device),
                position_ids=send(some.prompt_length[:, None] + step, device), **{cache_name: cache},
            ).last_hidden_state  # fmt: skip
        states = torch.cat([repeated_rows(last, owner)[:, None], states], 1)
        parts.append((rows, states.flatten(0, 1), torch.arange(len(rows)) * (T + 1)))
    return parts


class BehindPrompt(DynamicLayer):
    """What one layer's responses `[b, heads, T, width]` see: their own keys and values behind those of their prompts,
    of which `owner` says the row. Keeps nothing, so a layer that runs again sees the same."""

    def __init__(self, prompts: PromptLayer, owner: Int[Tensor, " b"], longest: int) -> None:
        super().__init__()
        assert isinstance(prompts.keys, Tensor)
        assert isinstance(prompts.values, Tensor)
        self.keys, self.values = prompts.keys[:, :, :longest], prompts.values[:, :, :longest]
        self.owner, self.is_initialized = owner, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        keys, values = repeated_rows(self.keys, self.owner), repeated_rows(self.values, self.owner)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


@contextmanager
def checkpoints_with_memory(trunk: nn.Module) -> Iterator[None]:
    """While open, layers that are checkpointed take the memory that they are given, which transformers otherwise
    takes from them: most memories grow when a layer runs again, those of this file do not."""
    layers = [m for m in checkpointed(trunk) if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache


def why_not_shared(trunk: nn.Module, rows: int) -> str | None:
    """What keeps responses in `read_shared` from looking at their prompts' kept keys and values; None where they get
    the states of a joined read.

    `rows` is the size of the vocabulary. Layers that see a window or keep a running state do not, nor does a model
    that takes no positions.
    """
    if math.isfinite(longest_seen(trunk)):
        return "some of its layers see a window of tokens, or keep a state"
    return why_states_differ(trunk, rows, partial(read_shared, cost=1 << 30))


def why_states_differ(trunk: nn.Module, rows: int, read: ReadShared) -> str | None:
    """What keeps `read` from the states of a joined read, tried on a few tokens; None where it gets them.

    `rows` is the size of the vocabulary. A trunk in training whose layers are checkpointed is tried so.
    """
    prompts = [[(5 * i + 3) % rows for i in range(n)] for n in (3, 5)]
    answers = [[(7 * i + b + 1) % rows for i in range(4)] for b in range(3)]
    tokens, device = Tokens.from_ids([prompts[0], prompts[0], prompts[1]], answers), device_of(trunk)
    first, which = shared_prompts(tokens)
    again = checkpointed(trunk)
    with quiet(trunk):
        for module in again:  # as in training, but for dropout
            module.training = True
        layout = join(tokens)
        whole = trunk(input_ids=send(layout.ids, device), use_cache=False).last_hidden_state
        try:
            found = read(trunk, tokens, first, which)
        except (TypeError, ValueError, AttributeError, RuntimeError, LookupError):
            return "its layers keep another kind of memory than keys and values"
    order, states, start = found[0]
    steps = torch.arange(tokens.response.shape[1] + 1)
    places = tokens.prompt_length[:, None] - 1 + steps
    expected = whole[send(torch.arange(len(tokens))[:, None], device), send(places, device)]
    got = states[send(start[:, None] + steps, device)]
    return None if close(got, expected[send(order, device)]) else "its states differ when the prompt is read apart"
