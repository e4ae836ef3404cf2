"""Prompts that several rows share, read once, and all rows one behind the other: `shared` without its padding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steersman.model.fast.apart import lines, one_behind_another, starts
from steersman.model.fast.narrow import narrowed
from steersman.model.fast.shared import Part, checkpoints_with_memory
from steersman.model.layout import require_prompts
from steersman.model.probe import cache_argument
from steersman.model.prompt_layer import PromptLayer
from steersman.native.sequences import row_starts
from steersman.types import Tokens


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
    for some in lines(tokens.prompt_length[first]):
        rows = torch.isin(which, some).nonzero()[:, 0]
        prompts = _Prompts(trunk, tokens.rows(first[some]), part)
        owner = torch.searchsorted(some, which[rows])
        for mine in lines(tokens.response_length[rows]):
            flat, start = prompts.responses(tokens.rows(rows[mine]), owner[mine], ends=ends)
            found.append((rows[mine], flat, start))
    return found


class _Prompts:
    """Prompts as the trunk has read them, for the responses behind them."""

    def __init__(self, trunk: nn.Module, tokens: Tokens, part: nn.Module | None) -> None:
        self.trunk, self.part, self.length = trunk, part, tokens.prompt_length
        self.memory = DynamicCache()
        self.memory.layer_class_to_replicate = PromptLayer
        ids, positions = one_behind_another(tokens.prompt, self.length)
        last = self.length.cumsum(0) - 1
        states = self._read(ids, positions, row_starts(self.length, self.length), self.memory, last)
        self.last = states.index_select(0, last)

    def responses(self, tokens: Tokens, owner: Int[Tensor, " b"], *, ends: bool) -> tuple[Tensor, Tensor]:
        """The states before each response and at its tokens, and where each row's first one is."""
        length = tokens.response_length
        start, behind = starts(length + 1), starts(length)
        ids, step = one_behind_another(tokens.response, length)
        if ids.numel() == 0:
            return self.last.index_select(0, owner), start
        row = torch.repeat_interleave(torch.arange(len(length)), length)
        positions = step + self.length[owner][row]
        cache, layers = DynamicCache(), self.memory.layers
        sizes = self.length.tolist(), owner.tolist(), length.tolist()
        cache.layers.extend(BehindPrompts(layer, *sizes) for layer in layers)  # type: ignore[arg-type]
        read = (behind + length - 1)[length > 0] if ends else torch.arange(ids.numel())
        states = self._read(ids, positions, row_starts(length, self.length[owner] + length), cache, read)
        order = torch.empty(int((length + 1).sum()), dtype=torch.long)
        order[start] = owner
        order[torch.arange(ids.numel()) + row + 1] = torch.arange(ids.numel()) + len(self.last)
        return torch.cat([self.last, states]).index_select(0, order), start

    def _read(
        self, ids: Tensor, positions: Tensor, rows: Tensor, cache: DynamicCache, places: Tensor
    ) -> Float[Tensor, "n H"]:
        with narrowed(self.part, places, ids.numel()), checkpoints_with_memory(self.trunk):
            return self.trunk(
                input_ids=ids[None], use_cache=False, attention_mask=rows, position_ids=positions[None],
                **{cache_argument(type(self.trunk)): cache},
            ).last_hidden_state[0]  # fmt: skip


class BehindPrompts(DynamicLayer):
    """What one layer's responses `[1, heads, T, width]`, one behind the other, see: for each row the keys and values
    of its prompt, and then its own. `prompt_length` tells the prompts apart, `owner` says which of them each row has,
    and `length` how many tokens are the row's. Keeps nothing, so a layer that runs again sees the same."""

    def __init__(self, prompts: PromptLayer, prompt_length: list[int], owner: list[int], length: list[int]) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = prompts.keys, prompts.values, True
        self.prompt_length, self.owner, self.length = prompt_length, owner, length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._behind(self.keys, key_states), self._behind(self.values, value_states)

    def _behind(self, prompts: Tensor | None, own: Tensor) -> Tensor:
        """In pieces, since torch adds up the gradients of gathered tokens one token at a time."""
        assert prompts is not None
        before = prompts[0].transpose(0, 1).split(self.prompt_length)
        after = own[0].transpose(0, 1).split(self.length)
        pieces = [x for g, mine in zip(self.owner, after, strict=True) for x in (before[g], mine)]
        return torch.cat(pieces).transpose(0, 1)[None]


def saved_apart(tokens: Tokens, first: Int[Tensor, " G"]) -> int:
    """Tokens that need not be read when each different prompt is read once."""
    return int(tokens.prompt_length.sum()) - int(tokens.prompt_length[first].sum())
