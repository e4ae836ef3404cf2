"""A live encoder-decoder that reads prompts once and then one response token per row and step, with its cache.

The decoder's own keys and values ride on the live cache, exactly as a causal model's do, but its sequences begin with
the decoder's start token and hold no prompt. Beside the live cache each live row has the keys and values of its
prompt, made in one forward of the encoder however often the prompt is sampled, and a mask over their padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from steersman.model.context import context_length
from steersman.model.encoder_decoder import decoder_context, decoder_start
from steersman.model.probe import cache_argument, close, model_name, quiet
from steersman.model.prompt_layer import PromptLayer
from steersman.rollout.cache import Keeps, LiveCache, PromptCache, layer_keeps
from steersman.rollout.fast.packed import for_call, packed, pays
from steersman.rollout.text import Texts
from steersman.types import Prompt, SteersmanError, send

KNOWN = "T5, mT5, UMT5, LongT5, T5Gemma, BART, mBART, PLBart, Marian, Pegasus and Blenderbot"


class PairCache:
    """What one prefill made: `self_attention` of the decoder's start, `cross_attention` of the prompts."""

    def __init__(self, keeps: list[Keeps]) -> None:
        self.self_attention, self.cross_attention = PromptCache(keeps), PromptCache(keeps)


class EncoderDecoderLiveCache:
    """The cache of all live sequences: the decoder's belt, and each row's prompt in buffers [slots, heads, width]."""

    def __init__(self, keeps: list[Keeps], start: int) -> None:
        layers = len(keeps)
        self.self_attention, self.start = LiveCache(keeps), start
        self.cross_attention = [PromptLayer() for _ in range(layers)]
        self.past = EncoderDecoderCache(self.self_attention, Cache(layers=list(self.cross_attention)))
        self.past.is_updated = dict.fromkeys(range(layers), True)
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.longest = 0
        self.lengths: list[int] = []

    @property
    def rows(self) -> int:
        return self.self_attention.rows

    def clear(self, column: int) -> None:
        """No live rows; `column` is the longest prompt that will come."""
        self.longest, self.lengths = column, []
        self.self_attention.clear(self.start)

    def reserve(self, slots: int, columns: int, like: PairCache) -> None:
        """Room for `slots` rows; `columns` counts the longest prompt, which has its own buffer here."""
        self.self_attention.reserve(slots, columns - self.longest + self.start, like.self_attention)
        keys = like.cross_attention.prompt_layers[0].keys
        assert isinstance(keys, Tensor)
        if self.buffers:
            return
        self.buffers = [
            (_room(slots, self.longest, layer.keys), _room(slots, self.longest, layer.values))
            for layer in like.cross_attention.prompt_layers
        ]
        self.mask = keys.new_zeros(slots, self.longest)
        self.length = torch.zeros(slots, 1, dtype=torch.long, device=keys.device)

    def release(self) -> None:
        """Give the buffers back."""
        self.self_attention.release()
        self.buffers, self.lengths = [], []
        for layer in self.cross_attention:
            layer.keys = layer.values = None

    def admit(self, prompts: PairCache, source: Tensor, length: int) -> None:
        """Lay prompts of `length` tokens into the next free rows: row i comes from row `source[i]` of `prompts`."""
        at, count = self.rows, len(source)
        rows, there = slice(at, at + count), send(source, self.mask.device)
        for buffers, layer in zip(self.buffers, prompts.cross_attention.prompt_layers, strict=True):
            for buffer, fresh in zip(buffers, (layer.keys, layer.values), strict=True):
                buffer[rows, :, :length] = fresh[there, :, :length]  # type: ignore[index]
        self.mask[rows] = -torch.inf
        self.mask[rows, :length] = 0
        self.length[rows] = length
        self.lengths += [length] * count
        self.self_attention.admit(prompts.self_attention, source, self.start)
        self._show()

    def wipe(self, rows: list[int]) -> None:
        """Zeroes rows that may hold NaN."""
        self.self_attention.wipe(rows)
        for buffers in self.buffers:
            for buffer in buffers:
                buffer[rows] = 0

    def keep(self, rows: int, moves: list[tuple[int, int]]) -> None:
        """Shrink to `rows` rows after copying row `source` over row `target` for each (target, source)."""
        self.self_attention.keep(rows, moves)
        for target, source in moves:
            length = self.lengths[target] = self.lengths[source]
            for buffers in self.buffers:
                for buffer in buffers:
                    buffer[target, :, :length] = buffer[source, :, :length]
            self.mask[target], self.length[target] = self.mask[source], self.length[source]
        del self.lengths[rows:]
        self._show()

    def _show(self) -> None:
        """What attention may read: live rows, up to the longest live prompt."""
        self.width = max(self.lengths, default=0)
        for layer, (keys, values) in zip(self.cross_attention, self.buffers, strict=True):
            layer.keys, layer.values = keys[: self.rows, :, : self.width], values[: self.rows, :, : self.width]
        mask = self.mask[: self.rows, None, None, : self.width]
        self.cross_mask = mask if mask.is_cpu else mask.clone()  # CUDA's attention wants it aligned


class PairDecoder:
    """Prefill and step of one encoder-decoder. No weights are copied: the module itself is called each time.

    Raises SteersmanError for a model whose rows can not stand at different positions of the decoder.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model, self.cache_name = model, cache_argument(type(model))
        self.start = decoder_start(model, tokenizer)
        self.context, self.decoder_context = context_length(model), decoder_context(model, self.start)
        # T5Gemma's decoder is told where each row stands, as a causal model is
        self.takes_positions = "position_ids" in signature(model.get_decoder().forward).parameters
        with quiet(model):
            try:
                self.live = EncoderDecoderLiveCache(self._keeps(), len(self.start))
                good = self._probe()
            except (TypeError, ValueError, AttributeError) as error:  # its modules are called in other ways
                raise SteersmanError(f"{self._refused()}: {type(error).__name__}: {_first_line(error)}") from error
        if not good:
            raise SteersmanError(self._refused())

    @property
    def one_length(self) -> bool:
        return False

    @contextmanager
    def prepared(self, rows: int, steps: int) -> Iterator[None]:
        """For one call: adapters added into their layers, weights laid out for products of few rows, where that
        pays."""
        with (
            for_call(self.model, steps),
            packed(self.model) if pays(self.model, steps) else nullcontext(),
        ):
            yield

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[PairCache, Tensor]:
        """One forward over right-padded prompts: their cache, and the logits [B, V] of each first response token."""
        cache = PairCache(self.live.self_attention.keeps)
        width, device = max(map(len, prompts)), self.model.device
        padded = send(torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts]), device)
        length = send(torch.tensor([len(ids) for ids in prompts]), device)
        out = self.model(
            input_ids=padded,
            attention_mask=(torch.arange(width, device=device) < length[:, None]).long(),
            decoder_input_ids=send(torch.tensor(self.start), device).expand(len(prompts), -1),
            use_cache=True,
            **{self.cache_name: EncoderDecoderCache(cache.self_attention, cache.cross_attention)},
        )
        return cache, out.logits[:, -1]

    def step(self, ids: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Logits [B, V] after feeding each live row one token; ids and positions [B, 1] count the prompt too."""
        live = self.live
        own = positions - live.length[: live.rows] + len(self.start)
        told = {"decoder_position_ids": own} if self.takes_positions else {}
        nothing = live.mask.new_zeros(1).expand(live.rows, 1, 1)  # the prompts' keys and values are cached
        with _positions(self.model.get_decoder(), own):
            out = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=nothing),  # type: ignore[arg-type]
                attention_mask=live.cross_mask,
                decoder_input_ids=ids,
                decoder_attention_mask=live.self_attention.step(len(self.start)),
                use_cache=True,
                **{self.cache_name: live.past},
                **told,
            )
        return out.logits[:, -1]

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Raises SteersmanError unless the prompt fits the encoder and `new_tokens` the decoder."""
        source, target = self.context, self.decoder_context
        if source is not None and len(prompt.ids) > source:
            raise SteersmanError(
                f"prompt {prompt.index} has {len(prompt.ids)} tokens; the encoder's context is {source}. Shorten the "
                "prompt (data.max_prompt_tokens with data.on_too_long: truncate)"
            )
        if target is not None and new_tokens > target:
            raise SteersmanError(
                f"max_new_tokens is {new_tokens}, but the decoder's context has room for a response of {target} "
                "tokens; lower rollout.max_new_tokens"
            )

    def texts(self, tokenizer: Any, stop: tuple[str, ...]) -> TargetTexts:
        """What decodes responses."""
        return TargetTexts(tokenizer, stop)

    def _keeps(self) -> list[Keeps]:
        """What each layer of the decoder keeps of what was said."""
        config = self.model.get_decoder().config
        if getattr(config, "layer_types", None):
            return layer_keeps(config)
        past = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids = torch.tensor([self.start], device=self.model.device)
        self.model(input_ids=ids, decoder_input_ids=ids, use_cache=True, **{self.cache_name: past})
        return [Keeps()] * len(past.cross_attention_cache.layers)

    def _refused(self) -> str:
        return (
            f"rollout: {model_name(self.model)} can not decode sequences of different ages side by side; this "
            f"encoder-decoder family is not supported ({KNOWN} are)"
        )

    def _probe(self) -> bool:
        """Whether two rows, one of which comes two tokens later, read as they do alone."""
        device, rows = self.model.device, self.model.get_input_embeddings().weight.shape[0]
        prompts = [[3 % rows, 5 % rows, 4 % rows], [5 % rows]]
        said = [[7 % rows, 3 % rows, 9 % rows, 4 % rows], [6 % rows, 8 % rows]]
        cache, _ = self.prefill(prompts)
        self.live.clear(3)
        self.live.reserve(2, 3 + 4, cache)
        logits = torch.zeros(0)
        for t in range(4):
            if t in (0, 2):
                row = self.live.rows
                self.live.admit(cache, torch.tensor([row]), len(prompts[row]))
            live = [(said[0][t], 3 + t), (said[1][t - 2], 1 + t - 2)][: self.live.rows]
            ids, positions = torch.tensor(live, device=device).split(1, -1)
            logits = self.step(ids, positions, 3)
        alone = [
            self.model(
                input_ids=torch.tensor([prompt], device=device),
                decoder_input_ids=torch.tensor([[*self.start, *ids]], device=device),
                use_cache=False,
            ).logits[0, -1]
            for prompt, ids in zip(prompts, said, strict=True)
        ]
        self.live.release()
        return close(logits, torch.stack(alone))


class TargetTexts:
    """`Texts` of responses that begin a text of their own, whatever the prompt was."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.inner = Texts(tokenizer, stop)
        self.stop = stop

    def response(self, prompt: list[int], ids: list[int]) -> str:
        return self.inner.response([], ids)

    def stopped(self, prompt: list[int], ids: list[int]) -> str | None:
        return self.inner.stopped([], ids)


@contextmanager
def _positions(decoder: Any, positions: Tensor) -> Iterator[None]:
    """Let a decoder with absolute positions use [B, 1] of them, one per row, where it would use one for all.

    T5's positions are distances, which the live cache's columns give by themselves.
    """
    table: nn.Module | None = getattr(decoder, "embed_positions", None)
    if table is None:
        yield
        return
    before = table.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": positions.flatten()}), with_kwargs=True
    )
    after = table.register_forward_hook(lambda _, args, out: out.reshape(len(positions), 1, -1))
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _room(slots: int, width: int, like: Any) -> Tensor:
    """A buffer [slots, heads, width, size]. Zeros, since NaN under a mask would still poison the sum."""
    return like.new_zeros(slots, like.shape[1], width, like.shape[3])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
