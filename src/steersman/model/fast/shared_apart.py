"""Prompts that several rows share, read once, and all rows one behind the other: `shared` without its padding.

Prompts and responses lie in one line and go through the trunk together, so that each weight has one gradient of them
all: with a read of its own for the prompts, the gradients of the responses would wait for those of the prompts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steersman.model.fast import apart
from steersman.model.fast.apart import one_behind_another, starts
from steersman.model.fast.narrow import narrowed
from steersman.model.fast.shared import Part, checkpoints_with_memory
from steersman.model.layout import require_prompts
from steersman.model.probe import cache_argument
from steersman.native.sequences import row_starts
from steersman.types import Tokens

PROMPTS_PER_LINE = 8
"""A line has room for so many times its longest prompt, so that few tokens are read again where a prompt's responses
need several lines."""


def read_shared_apart(
    trunk: nn.Module,
    tokens: Tokens,
    first: Int[Tensor, " G"],
    which: Int[Tensor, " B"],
    *,
    ends: bool = False,
    part: nn.Module | None = None,
) -> list[Part]:
    """Groups of rows with their states before each response token and after the last one.

    As `read_shared`, which pads. `first` is a row with each different prompt, `which` the prompt of each row.
    """
    require_prompts(tokens)
    found = []
    for rows in _lines(tokens, which):
        some, owner = which[rows].unique(return_inverse=True)
        states, start = _read(trunk, tokens.rows(first[some]), tokens.rows(rows), owner, ends=ends, part=part)
        found.append((rows, states, start))
    return found


def saved_apart(tokens: Tokens, first: Int[Tensor, " G"]) -> int:
    """Tokens that need not be read when each different prompt is read once."""
    return int(tokens.prompt_length.sum()) - int(tokens.prompt_length[first].sum())


def _lines(tokens: Tokens, which: Int[Tensor, " B"]) -> list[Int[Tensor, " b"]]:
    """The rows, those of one prompt together, in groups that are read at once."""
    groups: list[list[int]] = []
    total, longest, last = 0, 0, -1
    prompt_length, length = tokens.prompt_length.tolist(), tokens.response_length.tolist()
    for row, prompt in zip((order := which.argsort(stable=True)).tolist(), which[order].tolist(), strict=True):
        added = length[row] + (prompt_length[row] if prompt != last else 0)
        longest = max(longest, prompt_length[row])
        if not groups or total + added > max(apart.TOKENS_PER_READ, PROMPTS_PER_LINE * longest):
            groups.append([])
            total, longest, added = 0, prompt_length[row], prompt_length[row] + length[row]
        groups[-1].append(row)
        total, last = total + added, prompt
    return [torch.tensor(sorted(group)) for group in groups]


def _read(
    trunk: nn.Module,
    prompts: Tokens,
    tokens: Tokens,
    owner: Int[Tensor, " b"],
    *,
    ends: bool,
    part: nn.Module | None,
) -> tuple[Float[Tensor, "n H"], Int[Tensor, " b"]]:
    """The states before each response and at its tokens, and where each row's first one is."""
    before, length = prompts.prompt_length, tokens.response_length
    ids, positions = one_behind_another(prompts.prompt, before)
    own, step = one_behind_another(tokens.response, length)
    row = torch.repeat_interleave(torch.arange(len(length)), length)
    line = torch.cat([ids, own])
    positions = torch.cat([positions, step + before[owner][row]])
    last, mine = before.cumsum(0) - 1, len(ids) + torch.arange(len(own))
    ending = len(ids) + (length.cumsum(0) - 1)[length > 0]
    places = torch.cat([last, ending if ends else mine])
    cache = DynamicCache()
    sizes = before.tolist(), owner.tolist(), length.tolist()
    cache.layer_class_to_replicate = partial(BehindPrompts, *sizes)  # type: ignore[assignment]
    with narrowed(part, places, len(line)), checkpoints_with_memory(trunk):
        states = trunk(
            input_ids=line[None], use_cache=False, position_ids=positions[None],
            attention_mask=row_starts(torch.cat([before, length]), torch.cat([before, before[owner] + length])),
            **{cache_argument(type(trunk)): cache},
        ).last_hidden_state[0]  # fmt: skip
    start = starts(length + 1)
    order = torch.empty(int((length + 1).sum()), dtype=torch.long)
    order[start] = last[owner]
    order[torch.arange(len(own)) + row + 1] = mine
    return states.index_select(0, order), start


class BehindPrompts(DynamicLayer):
    """What the tokens `[1, heads, T, width]` of one layer see where prompts and then responses lie in one line: a
    prompt itself, a response its prompt and then itself. `prompt_length` and `length` are the tokens of each, `owner`
    says which prompt a response has. Keeps nothing, so a layer that runs again sees the same."""

    def __init__(self, prompt_length: list[int], owner: list[int], length: list[int]) -> None:
        super().__init__()
        self.prompt_length, self.owner, self.length = prompt_length, owner, length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._seen(key_states), self._seen(value_states)

    def _seen(self, line: Tensor) -> Tensor:
        """In pieces, since torch adds up the gradients of gathered tokens one token at a time."""
        prompts = len(self.prompt_length)
        pieces = line[0].transpose(0, 1).split([*self.prompt_length, *self.length])
        behind = [x for g, own in zip(self.owner, pieces[prompts:], strict=True) for x in (pieces[g], own)]
        return torch.cat([*pieces[:prompts], *behind]).transpose(0, 1)[None]
