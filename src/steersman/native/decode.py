"""Attention of one new token per sequence, and one draw per row, compiled.

At one token per sequence the library's attention spends its time on starting matrix products of a few rows, and a
draw goes over the vocabulary five times; here each is one pass.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from steersman.native import library, loaded


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v for one query per row: [B, 1, H, W], as transformers wants it.

    `query` is [B, H, 1, D], `keys` [B, K, L, D] and `values` [B, K, L, W] with H a multiple of K, `mask` an additive
    [B or 1, 1, 1, L]; all float32 on the CPU. Row and head of keys and values may be strided, columns may not.
    """
    lib = loaded()
    rows, heads, _, width = query.shape
    query = query.contiguous()
    out = query.new_empty(rows, 1, heads, values.shape[-1])
    sizes = (ctypes.c_int64 * 11)(
        rows, heads, keys.shape[1], keys.shape[2], width, values.shape[-1],
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
    )  # fmt: skip
    lib.decode_attention(
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), 0 if mask is None else mask.data_ptr(), out.data_ptr(),
        sizes, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out


def draws(x: Tensor, uniform: Tensor) -> bool:
    """Whether `draw` takes these logits, and as many uniform numbers."""
    return (
        library() is not None
        and x.is_cpu
        and x.dtype == torch.float32
        and x.dim() == 2
        and x.shape[1] > 0
        and x.stride(1) == 1
        and uniform.is_cpu
        and uniform.shape == x.shape[:1]
    )


def draw(x: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """`rollout.sampling.draw` in one pass over x [B, V]; the running sum is kept in float64."""
    lib = loaded()
    uniform = uniform.float().contiguous()
    ids, logp = torch.empty(len(x), dtype=torch.long), torch.empty(len(x))
    lib.draw(
        x.data_ptr(), uniform.data_ptr(), ids.data_ptr(), logp.data_ptr(), len(x), x.shape[1], x.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    return ids, logp
