"""How a model reads `Tokens`: the states that predict each response token, whatever the family.

A causal model reads prompt and response as one sequence. An encoder-decoder reads the prompt with its encoder,
with a mask over the padding, and the response with its decoder, shifted right behind the start token; the
decoder is causal, so padding after a response is never seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from steersman.model.fast.apart import compiled_here, fits, keeps_rows_apart, line_up, lines
from steersman.model.fast.narrow import last_feed_forward, narrowed
from steersman.model.fast.shared import (
    Part,
    call_cost,
    checkpointed,
    like_lengths,
    read_shared,
    saved_tokens,
    shared_prompts,
    why_not_shared,
    why_states_differ,
)
from steersman.model.fast.shared_apart import read_shared_apart, saved_apart
from steersman.model.layout import (
    Layout,
    join,
    masked_indices,
    pack,
    repeated_rows,
    require_prompts,
    response_slots,
)
from steersman.model.probe import device_of
from steersman.model.routers import Routers
from steersman.types import SteersmanError, Tokens, send


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

    def run_once_per_call(self) -> None:
        """From now on the trunk runs once in each call, whatever is in it: ranks that share weights must run it
        equally often."""
        ...

    def listen_to(self, routers: Routers) -> None:
        """From now on the model's routers are listened to in each read that counts for them."""
        ...


@dataclass(slots=True)
class CausalReader:
    """A causal trunk over prompt and response joined; `pack` lays several rows into one of so many tokens.

    Without packing, rows go through the trunk one behind the other where the compiled attention keeps them apart
    (`model.fast.apart`), elsewhere those of like length together; a prompt that several rows share is read once where
    the model allows it (`model.fast.shared`) and that saves more than it costs.
    """

    trunk: Any
    pack: int | None = None
    keeps_apart: bool | None = None
    """Whether the trunk keeps rows apart that lie one behind the other; found out when it first would."""
    shares: dict[tuple[bool, bool], bool] = field(default_factory=dict)
    """Whether the trunk can share prompts, by whether its layers are checkpointed and its rows lie one behind the
    other; found out likewise."""
    single: bool = False
    """Whether the trunk runs once in each call."""
    feed_forward: nn.Module | bool | None = None
    """What is done only where states are read (`model.narrow`), False where nothing can be; found out likewise."""
    routers: Routers | None = None
    """What the trunk's routers say is kept here; each row's tokens then count, and none is left out or shared."""

    @property
    def start(self) -> tuple[int, ...]:
        return ()

    def run_once_per_call(self) -> None:
        self.single = True

    def listen_to(self, routers: Routers) -> None:
        self.routers = routers

    def hidden(self, tokens: Tokens, extra: int = 0) -> Float[Tensor, "N H"]:
        parts = self._parts(tokens, extra)
        width = torch.arange(tokens.response.shape[1] + extra)
        count = tokens.response_length + extra
        read = []
        for rows, flat, first in parts:
            places = (first[:, None] + width)[width < count[rows, None]]
            read.append(flat[send(places, flat.device)])
        if len(parts) == 1:
            return read[0]
        rows = torch.cat([rows for rows, _, _ in parts])
        begin = torch.empty_like(count)
        begin[rows] = count[rows].cumsum(0) - count[rows]
        return torch.cat(read)[send((begin[:, None] + width)[width < count[:, None]], read[0].device)]

    def ends(self, tokens: Tokens) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H"]]:
        parts = self._parts(tokens, None)
        back = torch.cat([rows for rows, _, _ in parts]).argsort()
        before = torch.cat([flat[send(first, flat.device)] for _, flat, first in parts])
        after = [flat[send(first + tokens.response_length[rows], flat.device)] for rows, flat, first in parts]
        back = send(back, before.device)
        return before[back], torch.cat(after)[back]

    def _parts(self, tokens: Tokens, extra: int | None) -> list[Part]:
        """Groups of rows, the states of each group, flattened, and where the state before each row's response
        is among them; the states after the response's tokens follow it.

        Read are the states that `extra` asks for, as in `hidden`, or the first and last of each row where it is None;
        others need not be right.
        """
        if self.pack is not None:
            layout = pack(tokens, self.pack)
            return [(torch.arange(len(tokens)), *self._states(tokens, layout, extra))]
        if self.single:
            return [(torch.arange(len(tokens)), *self._states(tokens, join(tokens), extra))]
        cost = call_cost(device_of(self.trunk))
        apart = len(tokens) > 1 and self._keeps_apart(tokens)
        if len(tokens) > 1 and not self._listens():
            first, which = shared_prompts(tokens)
            saves = saved_apart(tokens, first) > 0 if apart else saved_tokens(tokens, first) > cost
            if saves and self._can_share(apart):
                ends, part = extra is None, self._part()
                if apart:
                    return read_shared_apart(self.trunk, tokens, first, which, ends=ends, part=part)
                return read_shared(self.trunk, tokens, first, which, cost, ends=ends, part=part)
        parts = []
        for rows in lines(tokens.length) if apart else like_lengths(tokens.length, cost):
            some = tokens.rows(rows)
            parts.append((rows, *self._states(some, line_up(some) if apart else join(some), extra)))
        return parts

    def _states(self, tokens: Tokens, layout: Layout, extra: int | None) -> tuple[Tensor, Tensor]:
        first = layout.start + tokens.prompt_length - 1
        if extra is None:
            places = torch.cat([first, (first + tokens.response_length)[tokens.response_length > 0]])
        else:
            column = torch.arange(tokens.response.shape[1] + extra)
            places = (first[:, None] + column)[response_slots(tokens, extra)]
        if self._listens():
            return self._listened(tokens, layout), first
        with narrowed(self._part(), send(places, device_of(self.trunk)), layout.ids.numel()):
            return states(self.trunk, layout), first

    def _listens(self) -> bool:
        return self.routers is not None and self.routers.listens

    def _listened(self, tokens: Tokens, layout: Layout) -> Tensor:
        """The states, where every token of every row counts for the routers."""
        assert self.routers is not None
        column = torch.arange(int(tokens.length.max()))
        real = (layout.start[:, None] + column)[column < tokens.length[:, None]]
        with self.routers.reading(send(real, device_of(self.trunk)), layout.ids.numel()):
            return states(self.trunk, layout)

    def _part(self) -> nn.Module | None:
        """The last layer's feed-forward part, where it may be narrowed."""
        if self._checkpointed():  # which runs the layer again later
            return None
        if self.feed_forward is None:
            self.feed_forward = last_feed_forward(self.trunk, self._vocabulary()) or False
        return self.feed_forward or None  # type: ignore[return-value]

    def _checkpointed(self) -> bool:
        return bool(checkpointed(self.trunk))

    def _keeps_apart(self, tokens: Tokens) -> bool:
        if not (compiled_here(self.trunk) and fits(self.trunk, tokens)):
            return False
        if self.keeps_apart is None:
            self.keeps_apart = keeps_rows_apart(self.trunk, self._vocabulary())
        return self.keeps_apart

    def _can_share(self, apart: bool) -> bool:
        now = self._checkpointed(), apart
        if now not in self.shares:
            trunk, rows = self.trunk, self._vocabulary()
            why = why_states_differ(trunk, rows, read_shared_apart) if apart else why_not_shared(trunk, rows)
            self.shares[now] = why is None
        return self.shares[now]

    def _vocabulary(self) -> int:
        return self.trunk.get_input_embeddings().weight.shape[0]


@dataclass(slots=True)
class EncoderDecoderReader:
    """An encoder over prompts and a decoder over responses; `start` is what the decoder reads before a response.

    A prompt that stands in several rows is encoded once.
    """

    encoder: nn.Module
    decoder: nn.Module
    start: tuple[int, ...]

    def run_once_per_call(self) -> None:
        return None

    def listen_to(self, routers: Routers) -> None:
        raise SteersmanError("the routers of an encoder-decoder are not read")

    def hidden(self, tokens: Tokens, extra: int = 0) -> Float[Tensor, "N H"]:
        found = self._states(tokens, extra)
        return found.flatten(0, 1)[masked_indices(response_slots(tokens, extra), found.device)]

    def ends(self, tokens: Tokens) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H"]]:
        found = self._states(tokens, extra=1)
        last = torch.arange(len(tokens)) * found.shape[1] + tokens.response_length
        return found[:, 0], found.flatten(0, 1)[send(last, found.device)]

    def _states(self, tokens: Tokens, extra: int) -> Float[Tensor, "B T+extra H"]:
        memory, real = self._encode(tokens)
        first = len(self.start) - 1
        start = tokens.response.new_tensor(self.start).expand(len(tokens), -1)
        response = tokens.response.masked_fill(~response_slots(tokens), 0)
        ids = torch.cat([start, response], 1)[:, : first + tokens.response.shape[1] + extra]
        return decode(self.decoder, send(ids, memory.device), memory, send(real, memory.device))[:, first:]

    def _encode(self, tokens: Tokens) -> tuple[Float[Tensor, "B P H"], Bool[Tensor, "B P"]]:
        require_prompts(tokens)
        column = torch.arange(tokens.prompt.shape[1], device=tokens.prompt.device)
        real = column < tokens.prompt_length[:, None]
        known = torch.cat([tokens.prompt.masked_fill(~real, 0), tokens.prompt_length[:, None]], 1)
        once, row = torch.unique(known, dim=0, return_inverse=True)
        device = device_of(self.encoder)
        memory = encode(self.encoder, send(once[:, :-1], device), send(column < once[:, -1:], device))
        return repeated_rows(memory, send(row, device)), real


def states(trunk: nn.Module, layout: Layout) -> Float[Tensor, "RL H"]:
    """A causal trunk's last hidden states, flattened. No attention mask: nothing on the right can be seen, and where
    `row_starts` stands in its place, nothing of other rows."""
    device = device_of(trunk)
    more = {} if layout.positions is None else {"position_ids": send(layout.positions, device)}
    if layout.row_starts is not None:
        more["attention_mask"] = layout.row_starts
    return trunk(input_ids=send(layout.ids, device), use_cache=False, **more).last_hidden_state.flatten(0, 1)


def encode(encoder: nn.Module, ids: Tensor, real: Bool[Tensor, "B P"]) -> Float[Tensor, "B P H"]:
    """The encoder's states of ids where `real` is True."""
    return encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state


def decode(decoder: nn.Module, ids: Tensor, memory: Tensor, real: Bool[Tensor, "B P"]) -> Float[Tensor, "B L H"]:
    """The decoder's states of ids, looking at the encoder's states where `real` is True."""
    return decoder(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),  # else T5Gemma takes a pad token among them for padding
        encoder_hidden_states=memory,
        encoder_attention_mask=real.long(),
        use_cache=False,
    ).last_hidden_state
