"""Key/value caches for decoding: a prompt's, written once, and the live cache that all live sequences share.

The live cache is a buffer [slots, heads, columns, width] per layer, allocated once. Every live sequence ends at the
same column: a newcomer's prompt is laid down so that it ends at the current one, and each step writes the next
column of all rows with one slice copy. Keys carry their rotation already, so the column says nothing about the
position. Attention reads the columns from the oldest live start to now, no more; rows that started later are
masked before their start. A sliding window is the last columns of that range, for all rows alike, because
distance in columns is distance in positions. When the live cache runs out it is moved back to its beginning.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from steersman.model.shape import key_widths
from steersman.types import SteersmanError, send

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window in tokens of each layer that keeps keys of its own, None where it sees everything; refuses
    other kinds of layers. Layers that read the keys of others come last and have no place in a cache."""
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or [FULL]) - {FULL, SLIDING}
    windows: list[int | None] = []
    for layer in DynamicCache(config=config).layers[: len(key_widths(text))]:
        if kinds or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise SteersmanError(
                f"rollout: a {text.model_type} model with layers of kind "
                f"{sorted(kinds) or type(layer).__name__} is not supported; full and sliding-window attention are"
            )
        windows.append(getattr(layer, "sliding_window", None))
    return windows


def kv_cache_bytes(config: PretrainedConfig, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values, 2 * batch * length * bytes of the dtype * the layers' heads * width added up."""
    return 2 * sum(key_widths(config.get_text_config(decoder=True))) * batch * length * dtype.itemsize


class PromptLayer(CacheLayerMixin):
    """Keeps the keys and values of one forward over right-padded prompts, as the model made them."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_max_length(self) -> int:
        return -1


class PromptCache(Cache):
    """The keys and values of one prefill."""

    def __init__(self, layers: int) -> None:
        self.prompt_layers = [PromptLayer() for _ in range(layers)]
        super().__init__(layers=list(self.prompt_layers))


class LiveLayer(CacheLayerMixin):
    """One layer of the live cache; `first` and `column` are set by the live cache before each step."""

    is_sliding = False

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.first = self.column = 0
        self.live_keys: Tensor | None = None
        self.live_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise RuntimeError("the live cache is allocated by LiveCache.reserve")

    def allocate(self, slots: int, columns: int, keys: Tensor, values: Tensor) -> None:
        self.keys = _zeros(slots, columns, keys)
        self.values = _zeros(slots, columns, values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values, column, first = self.live_keys, self.live_values, self.column, self.first
        assert keys is not None
        assert values is not None
        keys.narrow(2, column, 1).copy_(key_states)
        values.narrow(2, column, 1).copy_(value_states)
        length = column + 1 - first
        return keys.narrow(2, first, length), values.narrow(2, first, length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.column + query_length - self.first, 0

    def get_seq_length(self) -> int:
        return self.column - self.first

    def get_max_length(self) -> int:
        return -1


def _zeros(slots: int, columns: int, like: Tensor) -> Tensor:
    """A buffer [slots, heads, columns, width]. Zeros, since NaN under a mask would still poison the sum."""
    shape = (slots, like.shape[1], columns, like.shape[3])
    if not like.is_cpu:
        return like.new_zeros(shape)
    # numpy asks the system for huge pages; decoding with a 5M-parameter model was measured 12% faster with them
    pages = np.zeros(math.prod(shape) * like.element_size(), dtype=np.uint8)
    return torch.from_numpy(pages).view(like.dtype).view(shape)


class PromptOrigin(NamedTuple):
    """Which prompt a row began with: the admission that laid it down, its row there, and its length in tokens."""

    admission: int
    source: int
    length: int


class LiveCache(Cache):
    """The cache of all live sequences. Rows 0 to `rows` - 1 are live; `column` is where the next token goes."""

    def __init__(self, windows: list[int | None]) -> None:
        self.live_layers = [LiveLayer(window) for window in windows]
        super().__init__(layers=list(self.live_layers))
        self.windows = set(windows)
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
        """Make room for `slots` rows and `columns` columns; what is there already is used again."""
        first = like.prompt_layers[0].keys
        assert isinstance(first, Tensor)
        old = self.mask
        if old is not None and old.dtype == first.dtype and old.device == first.device:
            if old.shape[0] >= slots and old.shape[1] >= columns:
                return
            slots, columns = max(slots, old.shape[0]), max(columns, old.shape[1])
        self.release()
        for own, layer in zip(self.live_layers, like.prompt_layers, strict=True):
            own.allocate(slots, columns, layer.keys, layer.values)  # type: ignore[arg-type]
        self.mask = first.new_zeros(slots, columns)

    def release(self) -> None:
        """Give the buffers back."""
        self.mask = None
        for own in self.live_layers:
            own.keys = own.values = own.live_keys = own.live_values = None
            own.is_initialized = False

    def admit(self, prompts: PromptCache, source: Tensor, length: int) -> None:
        """Lay prompts of `length` tokens into the next free rows: row i comes from row `source[i]` of `prompts`;
        `source` is on the CPU."""
        assert self.mask is not None
        start, count, there = self.column - length, len(source), send(source, self.mask.device)
        rows = slice(self.rows, self.rows + count)
        for own, layer in zip(self.live_layers, prompts.prompt_layers, strict=True):
            for buffer, fresh in ((own.keys, layer.keys), (own.values, layer.values)):
                buffer[rows, :, start : self.column] = fresh[there, :, :length]  # type: ignore[index]
        self.mask[rows, :start] = -torch.inf
        self.mask[rows, start:] = 0
        self.starts += [start] * count
        self.prompts += [PromptOrigin(self.admitted, row, length) for row in source.tolist()]
        self.admitted += 1
        self._resize(self.rows + count)

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
            self.mask[target].copy_(self.mask[source])
        del self.starts[rows:], self.prompts[rows:]
        self._resize(rows)

    def step(self, longest: int) -> Tensor | dict[str, Tensor]:
        """Prepare the next column and return the attention mask for it, additive, [rows, 1, 1, columns seen].

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
        if len(masks) == 1:
            return next(iter(masks.values()))
        return {FULL if window is None else SLIDING: mask for window, mask in masks.items()}

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
