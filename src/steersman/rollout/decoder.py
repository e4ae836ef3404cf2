"""A live causal model that reads prompts and then one token per row and step, with its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steersman.rollout.cache import Belt, PromptCache, layer_windows

MASKED_ATTENTION = ("sdpa", "eager")
"""The attention backends that take a mask per row and column."""


class Decoder:
    """Prefill and step of one model. No weights are copied: the module itself is called each time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.belt = Belt(layer_windows(model.config))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[PromptCache, Tensor]:
        """One forward over right-padded prompts: their cache, and the logits [B, V] after each one's last token."""
        lengths = [len(ids) for ids in prompts]
        width = max(lengths)
        device = self.model.device
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts], device=device)
        last = torch.tensor(lengths, device=device) - 1
        cache = PromptCache(len(self.belt.belts))
        positions = torch.arange(width, device=device).expand(len(prompts), -1)
        with _last_only(self.model.get_output_embeddings(), last):
            out = self.model(
                input_ids=padded,
                attention_mask=torch.ones_like(padded),  # causality hides the padding; None would draw a warning
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        return cache, out.logits[:, -1]

    def step(self, ids: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Logits [B, V] after feeding each live row one token; ids and positions are [B, 1]."""
        out = self.model(
            input_ids=ids,
            attention_mask=self.belt.step(longest),
            position_ids=positions,
            past_key_values=self.belt,
            use_cache=True,
        )
        return out.logits[:, -1]


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
    """Evaluation mode, no gradients, and an attention backend that takes masks; everything put back after."""
    training = [module for model in models for module in model.modules() if module.training]
    backends = [(model, model.config._attn_implementation) for model in models]
    other = [(model, backend) for model, backend in backends if backend not in MASKED_ATTENTION]
    try:
        for model in models:
            model.eval()
        for model, _ in other:
            model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
        for model, backend in other:
            model.set_attn_implementation(backend)
