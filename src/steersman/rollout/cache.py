"""Key/value caches for decoding: a prompt's, written once, and the live cache that all live sequences share.

The live cache is a buffer [slots, heads, columns, width] per layer, allocated once. Every live sequence ends at the
same column: a newcomer's prompt is laid down so that it ends at the current one, and each step writes the next
column of all rows with one slice copy. Keys carry their rotation already, so the column says nothing about the
position. Attention reads the columns from the oldest live start to now, no more; rows that started later are
masked before their start. A sliding window is the last columns of that range, for all rows alike, because
distance in columns is distance in positions. When the live cache runs out it is moved back to its beginning. Layers
with a state keep that for each row, beside or instead of keys (`recurrent`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, cache_utils
from transformers.cache_utils import Cache, LinearAttentionLayer

from steersman.model.prompt_layer import PromptLayer
from steersman.model.shape import key_widths, own_layers
from steersman.model.source import STATE_LAYERS
from steersman.rollout.attention_layers import LiveLayer
from steersman.rollout.recurrent import HybridLiveLayer, HybridPromptLayer, LiveState
from steersman.types import SteersmanError, send

FULL, SLIDING = "full_attention", "sliding_attention"


class Keeps(NamedTuple):
    """What one layer keeps of the text before: keys and values, those of a window of so many tokens only, and so many
    states of one size."""

    keys: bool = True
    window: int | None = None
    states: int = 0


KEEPS = {
    "DynamicLayer": (True, False),
    "DynamicSlidingWindowLayer": (True, False),
    "LinearAttentionLayer": (False, True),
    "LinearAttentionAndFullAttentionLayer": (True, True),
    "DummyLayer": (False, False),  # since transformers 5.23
}
"""Whether transformers' own memory of a layer has keys, and whether it has states."""


def layer_keeps(config: PretrainedConfig) -> list[Keeps]:
    """What each layer keeps; refuses other kinds. Layers that read the keys of others come last and are left out."""
    text = config.get_text_config(decoder=True)
    found = []
    for layer in DynamicCache(config=config).layers[: own_layers(text)]:
        kind = type(layer).__name__
        if kind not in KEEPS:
            raise SteersmanError(
                f"rollout: a {text.model_type} model with layers of kind {kind} is not supported; "
                "full and sliding-window attention and layers with a state are"
            )
        keys, states = KEEPS[kind]
        found.append(
            Keeps(
                keys, getattr(layer, "sliding_window", None), getattr(layer, "number_of_states", 1) if states else 0
            )
        )
    return found


def kv_cache_bytes(config: PretrainedConfig, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values, 2 * batch * length * bytes of the dtype * the layers' heads * width added up."""
    return 2 * sum(key_widths(config.get_text_config(decoder=True))) * batch * length * dtype.itemsize


class PromptCache(Cache):
    """The keys, values and states of one prefill."""

    def __init__(self, keeps: list[Keeps]) -> None:
        layers: list[Any] = [_prompt_layer(one) for one in keeps]
        self.prompt_layers: list[PromptLayer] = [layer for one, layer in zip(keeps, layers, strict=True) if one.keys]
        self.states: list[LinearAttentionLayer] = [
            layer for one, layer in zip(keeps, layers, strict=True) if one.states
        ]
        super().__init__(layers=layers)

    @property
    def first(self) -> Tensor:
        """A tensor of what was kept, with its precision and device."""
        kept = self.prompt_layers[0].keys if self.prompt_layers else self.states[0].conv_states[0]
        assert isinstance(kept, Tensor)
        return kept


def _prompt_layer(keeps: Keeps) -> PromptLayer | LinearAttentionLayer | cache_utils.DummyLayer:
    if not keeps.keys:
        return LinearAttentionLayer(number_of_states=keeps.states) if keeps.states else cache_utils.DummyLayer()
    return HybridPromptLayer(keeps.states) if keeps.states else PromptLayer()


def _live_layer(keeps: Keeps) -> LiveLayer | LiveState | cache_utils.DummyLayer:
    if not keeps.keys:
        return LiveState(keeps.states) if keeps.states else cache_utils.DummyLayer()
    return HybridLiveLayer(keeps.states) if keeps.states else LiveLayer(keeps.window)


class PromptOrigin(NamedTuple):
    """Which prompt a row began with: the admission that laid it down, its row there, and its length in tokens."""

    admission: int
    source: int
    length: int


class LiveCache(Cache):
    """The cache of all live sequences. Rows 0 to `rows` - 1 are live; `column` is where the next token goes."""

    def __init__(self, keeps: list[Keeps]) -> None:
        layers: list[Any] = [_live_layer(one) for one in keeps]
        self.live_layers: list[LiveLayer] = [layer for one, layer in zip(keeps, layers, strict=True) if one.keys]
        self.states: list[LiveState] = [layer for one, layer in zip(keeps, layers, strict=True) if one.states]
        super().__init__(layers=layers)
        self.keeps, self.windows = keeps, {layer.window for layer in self.live_layers}
        self.mask: Tensor | None = None
        self.rows = self.column = self.first = self.admitted = 0
        self.starts: list[int] = []
        self.prompts: list[PromptOrigin] = []
        self._reading: np.ndarray | None = None

    def clear(self, column: int) -> None:
        """No live rows; the first prompts will end at `column`."""
        self.starts, self.prompts = [], []
        self.rows, self.first, self.column, self._reading = 0, column, column, None

    def reserve(self, slots: int, columns: int, like: PromptCache) -> None:
        """Makes room for `slots` rows and `columns` columns, where there is none yet."""
        if self.mask is not None:
            return
        for own, layer in zip(self.live_layers, like.prompt_layers, strict=True):
            own.allocate(slots, columns, layer.keys, layer.values)  # type: ignore[arg-type]
        for state, left in zip(self.states, like.states, strict=True):
            state.make_room(slots, left)
        self.mask = like.first.new_zeros(slots, columns)

    def release(self) -> None:
        """Give the buffers back."""
        self.mask = None
        for own in self.live_layers:
            own.keys = own.values = own.live_keys = own.live_values = None
            own.is_initialized = False
        for state in self.states:
            state.give_back()

    def admit(self, prompts: PromptCache, source: Tensor, length: int) -> None:
        """Lay prompts of `length` tokens into the next free rows: row i comes from row `source[i]` of `prompts`;
        `source` is on the CPU."""
        assert self.mask is not None
        start, count, there = self.column - length, len(source), send(source, self.mask.device)
        rows = slice(self.rows, self.rows + count)
        for own, layer in zip(self.live_layers, prompts.prompt_layers, strict=True):
            for buffer, fresh in ((own.keys, layer.keys), (own.values, layer.values)):
                buffer[rows, :, start : self.column] = fresh[there, :, :length]  # type: ignore[index]
        for state, left in zip(self.states, prompts.states, strict=True):
            state.take_in(rows, left, there)
        self.mask[rows, :start] = -torch.inf
        self.mask[rows, start:] = 0
        self.starts += [start] * count
        self.prompts += [PromptOrigin(self.admitted, row, length) for row in source.tolist()]
        self.admitted += 1
        self._resize(self.rows + count)

    def wipe(self, rows: list[int]) -> None:
        """Zeroes rows that may hold NaN, which would still poison the sum under the mask of whoever has them next."""
        for own in self.live_layers:
            for buffer in (own.keys, own.values):
                buffer[rows] = 0  # type: ignore[index]
        for state in self.states:
            state.wipe(rows)

    def keep(self, rows: int, moves: list[tuple[int, int]]) -> None:
        """Shrink to `rows` rows after copying row `source` over row `target` for each (target, source)."""
        assert self.mask is not None
        for target, source in moves:
            start = self.starts[target] = self.starts[source]
            self.prompts[target] = self.prompts[source]
            length = self.column - start
            for own in self.live_layers:
                for buffer in (own.keys, own.values):
                    assert buffer is not None
                    buffer[target].narrow(1, start, length).copy_(buffer[source].narrow(1, start, length))
            for state in self.states:
                state.move(target, source)
            self.mask[target].copy_(self.mask[source])
        del self.starts[rows:], self.prompts[rows:]
        self._resize(rows)

    def step(self, longest: int) -> Tensor | dict[str, Tensor | None] | None:
        """Prepare the next column and return the attention mask for it, additive, [rows, 1, 1, columns seen]; None
        where no layer has attention.

        `longest` is the longest prompt that may still come; a live cache at its end keeps that much room before now.
        """
        assert self.mask is not None
        if self.column == self.mask.shape[1]:
            self._rewind(max(self.column - self.first, longest))
        masks: dict[int | None, Tensor] = {}
        for window in self.windows:
            first = self.first if window is None else max(self.first, self.column + 1 - window)
            mask = self.mask[: self.rows, None, None, first : self.column + 1]
            masks[window] = mask if mask.is_cpu else mask.clone()  # CUDA's attention wants it aligned
        for own in self.live_layers:
            own.column = self.column
            own.first = self.column + 1 - masks[own.window].shape[-1]
        self.column += 1
        if len(masks) < 2:
            return next(iter(masks.values()), None)
        return {FULL if window is None else SLIDING: mask for window, mask in masks.items()} | dict.fromkeys(
            STATE_LAYERS
        )

    def reading(self) -> np.ndarray:
        """How live rows are best read, int64 [4, rows]: their order, and of each row its first column, a row that has
        the same keys and values in its first columns, and the column where those end.

        Samples of one prompt that came in together have the same prompt, each a copy of its own. In this order they
        follow one another, so that whoever reads one copy for all of them finds it at hand.
        """
        if self._reading is None:
            leaders: dict[PromptOrigin, int] = {}
            leader = [leaders.setdefault(prompt, row) for row, prompt in enumerate(self.prompts)]
            until = [start + prompt.length for start, prompt in zip(self.starts, self.prompts, strict=True)]
            order = sorted(range(self.rows), key=leader.__getitem__)
            self._reading = np.array([order, self.starts, leader, until], dtype=np.int64)
        return self._reading

    def _resize(self, rows: int) -> None:
        self.rows, self._reading = rows, None
        self.first = min(self.starts, default=self.column)
        for own in self.live_layers:
            own.live_keys, own.live_values = own.keys[:rows], own.values[:rows]  # type: ignore[index]
        for state in self.states:
            state.show(rows)

    def _rewind(self, column: int) -> None:
        """Move the live columns back so that they end at `column`."""
        assert self.mask is not None
        shift, first, rows = self.column - column, self.first, self.rows
        for own in self.live_layers:
            for buffer in (own.keys, own.values):
                assert buffer is not None
                live = buffer[:rows, :, first : self.column].clone()  # the ranges overlap
                buffer[:rows, :, first - shift : column] = live
        for row, start in enumerate(self.starts):
            self.starts[row] = start - shift
            self.mask[row, : start - shift] = -torch.inf
            self.mask[row, start - shift :] = 0
        self._reading = None
        self.first, self.column = first - shift, column
