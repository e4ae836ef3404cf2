"""Attention as transformers calls it: the compiled one of `native` where it applies, torch's elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steersman import native
from steersman.model.fast.plain import plain
from steersman.native import decode, sequences

WIDEST = 1024
KNOWN = {
    "scaling", "dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions",
    "output_hidden_states", "output_router_logits",
}  # fmt: skip
"""Settings that are read here or say nothing that the mask doesn't."""


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """The compiled attention of one token per row or of whole sequences where it applies, torch's otherwise.

    Only the compiled one can be told where rows start in a mask's place (`apart`); RuntimeError where it does not
    apply then.
    """
    if query.is_cpu and not plain() and _asks_nothing_else(settings) and _grouped(module, query, key):
        scale = settings.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if _one_token(query, key, value, attention_mask):
            return decode.decode_attention(query, key, value, attention_mask, scale), None
        if _sequences(module, query, key, value, attention_mask, settings):
            return sequences.attend(query, key, value, attention_mask, scale), None
    if sequences.says_rows(attention_mask):
        raise RuntimeError("rows that stand one behind the other are kept apart by the compiled attention alone")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


def _asks_nothing_else(settings: dict[str, Any]) -> bool:
    return not settings.get("dropout") and all(v is None for name, v in settings.items() if name not in KNOWN)


def _grouped(module: Any, query: Tensor, key: Tensor) -> bool:
    """Whether there are as many heads of keys as the layer says; torch repeats these as often as it is told."""
    return query.shape[1] == key.shape[1] * getattr(module, "num_key_value_groups", 1)


def _one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """One float32 token per row on the CPU without gradients, columns side by side."""
    return (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[2] == 1
        and native.library() is not None
        and all(x.is_cpu and x.numel() > 0 for x in (query, key, value))
        and sequences.of_one_kind(query, key, value)
        and query.dtype == key.dtype == value.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and max(query.shape[-1], value.shape[-1]) <= WIDEST
        and key.stride()[2:] == (key.shape[3], 1)
        and value.stride()[2:] == (value.shape[3], 1)
        and (
            mask is None
            or (mask.dtype == torch.float32 and mask.shape[1:3] == (1, 1) and mask.shape[-1] == key.shape[2]
                and mask.shape[0] in (1, len(query)) and mask.stride(-1) == 1 and mask.is_cpu)
        )
    )  # fmt: skip


def _sequences(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]
) -> bool:
    """Several tokens per row that see what came before them, or what a mask says."""
    if query.shape[2] == 1 and not sequences.says_rows(mask):
        return False
    if not sequences.attends(query, key, value, mask):
        return False
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return mask is not None or (causal is True and query.shape[2] == key.shape[2])
