"""What layers with a state leave of the text before: the state itself, of one size however long the text is.

Linear attention, state-space layers and short convolutions carry a state from token to token. A prefill leaves it as
it was after the prompt's last token, so its prompts have one length: padding would run into it. The live cache has a
row for each live sequence, and the layers write the next state over the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from steersman.model.prompt_layer import PromptLayer
from steersman.rollout.attention_layers import LiveLayer


class HybridPromptLayer(LinearAttentionLayer, PromptLayer):  # type: ignore[override]
    """A layer with a state beside its attention, of one prefill."""

    def __init__(self, states: int) -> None:
        PromptLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=states)


class LiveState(LinearAttentionLayer):
    """One layer's states of all live rows; `states` is how many it has."""

    def __init__(self, states: int) -> None:
        super().__init__(number_of_states=states)
        self.buffers: dict[tuple[str, int], Tensor] = {}

    def make_room(self, slots: int, like: LinearAttentionLayer) -> None:
        """Buffers [slots, ...] for what a prefill left."""
        self.buffers = {name: x.new_zeros(slots, *x.shape[1:]) for name, x in _states(like)}
        self.conv_kernel_size = dict(like.conv_kernel_size)

    def give_back(self) -> None:
        """Drops the buffers."""
        self.buffers = {}
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)

    def take_in(self, rows: slice, like: LinearAttentionLayer, source: Tensor) -> None:
        """Row i of `rows` begins with the state of row `source[i]` of a prefill."""
        for name, x in _states(like):
            self.buffers[name][rows] = x[source]

    def move(self, target: int, source: int) -> None:
        """Copies row `source` over row `target`."""
        for buffer in self.buffers.values():
            buffer[target].copy_(buffer[source])

    def wipe(self, rows: list[int]) -> None:
        """Zeroes these rows."""
        for buffer in self.buffers.values():
            buffer[rows] = 0

    def show(self, rows: int) -> None:
        """Lets the model see, and write, the first rows."""
        for (kind, i), buffer in self.buffers.items():
            convolution = kind == "conv"
            (self.conv_states if convolution else self.recurrent_states)[i] = buffer[:rows]
            (self.is_conv_states_initialized if convolution else self.is_recurrent_states_initialized)[i] = True
            self.has_previous_state[i] = True


class HybridLiveLayer(LiveState, LiveLayer):  # type: ignore[override]
    """A layer with a state beside its attention, of all live rows."""

    def __init__(self, states: int) -> None:
        LiveLayer.__init__(self, None)
        LiveState.__init__(self, states)


def state_bytes(layers: Any) -> int:
    """Bytes of the states that a prefill left."""
    return sum(x.numel() * x.element_size() for layer in layers for _, x in _states(layer))


def _states(layer: LinearAttentionLayer) -> Iterator[tuple[tuple[str, int], Tensor]]:
    for kind, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
        for i, x in states.items():
            if isinstance(x, torch.Tensor):
                yield (kind, i), x
