"""How a model reads `Tokens`: the states that predict each response token, whatever the family.

A causal model reads prompt and response as one sequence. An encoder-decoder reads the prompt with its encoder,
with a mask over the padding, and the response with its decoder, shifted right behind the start token; the
decoder is causal, so padding after a response is never seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from steersman.model.layout import Layout, join, pack, predicting, require_prompts, response_slots
from steersman.types import Tokens


class Reader(Protocol):
    """The states of a batch, by row and response token. `start` is what a decoder of its own reads before each
    response; a causal model, which reads the prompt there, has none."""

    @property
    def start(self) -> tuple[int, ...]: ...

    def hidden(self, tokens: Tokens, extra: int = 0) -> Float[Tensor, "N H"]:
        """States that predict each response token, packed row by row; with `extra` 1 each row also has the state
        after its last token."""
        ...

    def ends(self, tokens: Tokens) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H"]]:
        """Each row's states before its response and after its last token."""
        ...


@dataclass(slots=True)
class Joined:
    """A causal trunk over prompt and response joined; `pack` lays several rows into one of so many tokens."""

    trunk: nn.Module
    pack: int | None = None

    @property
    def start(self) -> tuple[int, ...]:
        return ()

    def hidden(self, tokens: Tokens, extra: int = 0) -> Float[Tensor, "N H"]:
        layout = join(tokens) if self.pack is None else pack(tokens, self.pack)
        return states(self.trunk, layout)[predicting(tokens, layout, extra)]

    def ends(self, tokens: Tokens) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H"]]:
        layout = join(tokens)
        found = states(self.trunk, layout)
        return found[layout.start + tokens.prompt_length - 1], found[layout.start + tokens.length - 1]


@dataclass(slots=True)
class Pair:
    """An encoder over prompts and a decoder over responses; `start` is what the decoder reads before a response.

    A prompt that stands in several rows is encoded once.
    """

    encoder: nn.Module
    decoder: nn.Module
    start: tuple[int, ...]

    def hidden(self, tokens: Tokens, extra: int = 0) -> Float[Tensor, "N H"]:
        return self._states(tokens, extra)[response_slots(tokens, extra)]

    def ends(self, tokens: Tokens) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H"]]:
        found = self._states(tokens, extra=1)
        rows = torch.arange(len(tokens), device=found.device)
        return found[:, 0], found[rows, tokens.response_length]

    def _states(self, tokens: Tokens, extra: int) -> Float[Tensor, "B T+extra H"]:
        memory, real = self._encode(tokens)
        first = len(self.start) - 1
        start = tokens.response.new_tensor(self.start).expand(len(tokens), -1)
        response = tokens.response.masked_fill(~response_slots(tokens), 0)
        ids = torch.cat([start, response], 1)[:, : first + tokens.response.shape[1] + extra]
        return decode(self.decoder, ids, memory, real)[:, first:]

    def _encode(self, tokens: Tokens) -> tuple[Float[Tensor, "B P H"], Bool[Tensor, "B P"]]:
        require_prompts(tokens)
        column = torch.arange(tokens.prompt.shape[1], device=tokens.prompt.device)
        real = column < tokens.prompt_length[:, None]
        known = torch.cat([tokens.prompt.masked_fill(~real, 0), tokens.prompt_length[:, None]], 1)
        once, row = torch.unique(known, dim=0, return_inverse=True)
        return encode(self.encoder, once[:, :-1], column < once[:, -1:])[row], real


def states(trunk: nn.Module, layout: Layout) -> Float[Tensor, "RL H"]:
    """A causal trunk's last hidden states, flattened. No attention mask: nothing on the right can be seen."""
    positions = {} if layout.positions is None else {"position_ids": layout.positions}
    return trunk(input_ids=layout.ids, use_cache=False, **positions).last_hidden_state.flatten(0, 1)


def encode(encoder: nn.Module, ids: Tensor, real: Bool[Tensor, "B P"]) -> Float[Tensor, "B P H"]:
    """The encoder's states of ids where `real` is True."""
    return encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state


def decode(decoder: nn.Module, ids: Tensor, memory: Tensor, real: Bool[Tensor, "B P"]) -> Float[Tensor, "B L H"]:
    """The decoder's states of ids, looking at the encoder's states where `real` is True."""
    return decoder(
        input_ids=ids, encoder_hidden_states=memory, encoder_attention_mask=real.long(), use_cache=False
    ).last_hidden_state
