"""A live causal model that reads prompts and then one token per row and step, with its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steersman.model.context import context_length
from steersman.model.fast.fused import quick
from steersman.model.modes import evaluation_mode
from steersman.model.probe import cache_argument, model_name, probe_ids
from steersman.rollout.cache import LiveCache, PromptCache, layer_keeps
from steersman.rollout.fast.compiled_step import CompiledStep, compiled_step_of
from steersman.rollout.fast.packed import for_call, packed, pays
from steersman.rollout.recurrent import state_bytes
from steersman.rollout.text import Texts
from steersman.rollout.time_steps import clamped_time_steps
from steersman.types import Prompt, SteersmanError, send

COMPARED = (4, 20)
"""Tokens that are read at once before the others follow one by one, and tokens in all, where stepping is compared."""


class Decoder:
    """Prefill and step of one model: its modules are called, or, for steps, `compiled` where it does the same."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache_name = model, cache_argument(type(model))
        self.context = context_length(model)
        self.live = LiveCache(layer_keeps(model.config))
        self.compiled: CompiledStep | None = None
        self.compared = not self.live.states  # keys and values are the same, however they are read

    @property
    def one_length(self) -> bool:
        return bool(self.live.states)  # which padding would run into

    @contextmanager
    def prepared(self, rows: int, steps: int) -> Iterator[None]:
        """For one call: adapters added into their layers, weights laid out for `steps` steps of up to `rows` rows,
        where that pays. Raises SteersmanError where a model with states does not step as it reads."""
        with clamped_time_steps(self.model), for_call(self.model, steps):
            if not self.compared:
                self._compare()
            if not pays(self.model, steps):
                yield
                return
            try:
                self.compiled = compiled_step_of(self.model, rows)
                with packed(self.model) if self.compiled is None else nullcontext():
                    yield
            finally:
                self.compiled = None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[PromptCache, Tensor]:
        """One forward over right-padded prompts: their cache, and the logits [B, V] after each one's last token."""
        lengths = [len(ids) for ids in prompts]
        width = max(lengths)
        device = self.model.device
        padded = send(torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts]), device)
        last = send(torch.tensor(lengths) - 1, device)
        cache = PromptCache(self.live.keeps)
        positions = torch.arange(width, device=device).expand(len(prompts), -1)
        with _last_only(self.model.get_output_embeddings(), last):
            out = self.model(
                input_ids=padded,
                attention_mask=torch.ones_like(padded),  # causality hides the padding; None would draw a warning
                position_ids=positions,
                use_cache=True,
                **{self.cache_name: cache},
            )
        return cache, out.logits[:, -1]

    def step(self, ids: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Logits [B, V] after feeding each live row one token; ids and positions are [B, 1]."""
        mask = self.live.step(longest)
        compiled = self.compiled
        logits = None if compiled is None else compiled(ids, positions, self.live)
        if compiled is None or logits is None:
            return self._modules(ids, positions, mask)
        if not compiled.verified:
            expected = self._modules(ids, positions, mask)
            self.compiled = compiled if compiled.agrees(logits, expected) else None
            return expected
        return logits

    def _compare(self) -> None:
        """Reads a few tokens one by one, with states, and at once, without; asked of the model's own weights, once.

        Training reads whole texts, so a model that steps otherwise would record what it can not learn from.
        """
        read, length = COMPARED
        ids = probe_ids(self.model, length)
        whole = self.model(input_ids=ids, use_cache=False).logits[:, read - 1 :].float()
        cache, first = self.prefill(ids[:, :read].tolist())
        self.live.clear(read)
        try:
            self.live.reserve(len(ids), length, cache)
            self.live.admit(cache, torch.arange(len(ids)), read)
            rest = (ids[:, at : at + 1] for at in range(read, length))
            places = (torch.full_like(ids[:, :1], at) for at in range(read, length))
            steps = [first, *(self.step(some, place, read) for some, place in zip(rest, places, strict=True))]
        finally:
            self.live.release()
        gap, size = (torch.stack(steps, 1).float() - whole).abs().max(), whole.abs().max()
        if not size.isfinite():
            return  # it is told with the first response
        if not gap <= _rounding(self.model) * size:
            raise SteersmanError(
                f"{model_name(self.model)}: read token by token, its logits differ by up to {float(gap):.2g} from "
                f"those of the whole text, which are up to {float(size):.2g}. What is sampled would not be what is "
                f"trained: models of type '{self.model.config.model_type}' can not be sampled from here; train it on "
                "given answers, or sample with vLLM (rollout.engine: vllm, and rollout.recompute_logp: true)"
            )
        self.compared = True

    def _modules(self, ids: Tensor, positions: Tensor, mask: Any) -> Tensor:
        memory = {self.cache_name: self.live}
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **memory)
        return out.logits[:, -1]

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Raises SteersmanError unless prompt and `new_tokens` fit the model's context."""
        context = self.context
        length = len(prompt.ids)
        if context is not None and length + new_tokens > context:
            raise SteersmanError(
                f"prompt {prompt.index} has {length} tokens, which with max_new_tokens={new_tokens} makes "
                f"{length + new_tokens}; the model's context is {context}. Shorten the prompt or lower max_new_tokens"
            )

    def texts(self, tokenizer: Any, stop: tuple[str, ...]) -> Texts:
        """What decodes responses."""
        return Texts(tokenizer, stop)


def _rounding(model: Any) -> float:
    """How far logits may be apart, as a share of the largest; kernels of accelerators round products of float32."""
    if model.dtype not in (torch.float32, torch.float64):
        return 0.1
    return 1e-3 if model.device.type == "cpu" else 1e-2


def bytes_of_states(model: Any) -> int:
    """Bytes of the states that the model's layers keep of one sequence, however long it is."""
    if model.config.is_encoder_decoder:
        return 0
    decoder = Decoder(model)
    if not decoder.live.states:
        return 0
    with generating(model):
        cache, _ = decoder.prefill([[0]])
    return state_bytes(cache.states)


@contextmanager
def _last_only(head: nn.Module, last: Tensor) -> Iterator[None]:
    """Let the output layer see each row's last state only; logit scales and soft caps still apply after it."""
    rows = torch.arange(len(last), device=last.device)
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][rows, last][:, None],))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def generating(*models: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, compiled loops, and an attention that takes masks; everything put back after."""
    other = [(model, model.config._attn_implementation) for model in models]
    other = [(model, backend) for model, backend in other if backend != _backend(model)]
    try:
        for model, _ in other:
            model.set_attn_implementation(_backend(model))
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(*models))
            for model in models:
                stack.enter_context(quick(model))
            stack.enter_context(torch.inference_mode())
            yield
    finally:
        for model, backend in other:
            model.set_attn_implementation(backend)


def _backend(model: Any) -> str:
    """The attention to decode with: the model's own where only it can be had, else torch's."""
    return "eager" if model.config._attn_implementation == "eager" else "sdpa"
