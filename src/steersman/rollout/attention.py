"""transformers' attention interface with the compiled attention of single tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from steersman.native.decode import decode_attention

ATTENTION = "steersman_decode"
"""The name under which transformers knows the attention: torch's own, but for single tokens."""
WIDEST = 1024


@cache
def registered() -> str:
    """The attention's name, known to transformers from here on."""
    # imported where a model is at hand, and transformers' modelling with it
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: the compiled one where it applies, torch's otherwise."""
    if _applies(query, key, value, attention_mask, settings):
        scale = settings.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return decode_attention(query, key, value, attention_mask, scale), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


PLAIN = {"scaling", "dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions"}


def _applies(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> bool:
    """One float32 token per row on the CPU, columns side by side, and nothing asked for but the softmax."""
    return (
        query.shape[2] == 1
        and query.is_cpu
        and query.dtype == key.dtype == value.dtype == torch.float32
        and max(query.shape[-1], value.shape[-1]) <= WIDEST
        and key.stride()[2:] == (key.shape[3], 1)
        and value.stride()[2:] == (value.shape[3], 1)
        and (
            mask is None
            or (mask.dtype == torch.float32 and mask.shape[1:3] == (1, 1) and mask.shape[-1] == key.shape[2]
                and mask.stride(-1) == 1)
        )
        and not settings.get("dropout")
        and all(value is None for name, value in settings.items() if name not in PLAIN)
    )  # fmt: skip
