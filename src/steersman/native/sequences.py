"""Attention of whole sequences with its gradient, compiled: for sequences of a few hundred tokens on a CPU."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from steersman.native import library, loaded
from steersman.native.layers import as_saved

LONGEST = 4096
"""Keys beyond this number are left to the library, whose memory does not grow with them."""


class Strided(ctypes.Structure):
    """A tensor [B, H, T, D] as sequences.cpp sees it."""

    _fields_ = [("at", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64)]

    @classmethod
    def of(cls, x: Tensor) -> Strided:
        return cls(x.data_ptr(), *x.stride()[:3])


class Sequences(ctypes.Structure):
    """One call of sequences.cpp, field for field."""

    _fields_ = [
        *[
            (name, Strided)
            for name in (
                "query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value",
            )
        ],
        ("sums", c_void_p),
        ("mask", c_void_p),
        ("mask_batch", c_int64),
        ("mask_query", c_int64),
        *[(name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "width")],
        ("query_starts", c_void_p),
        ("key_starts", c_void_p),
        ("rows", c_int64),
        ("scale", c_float),
    ]  # fmt: skip


def of_one_kind(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the shapes are those of one attention, [B, H, T, D], [B, K, L, D] and [B, K, L, W]: nothing broadcast,
    as many keys as values, and H a multiple of K."""
    return (
        len(query) == len(key) == len(value)
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[3] == key.shape[3]
        and key.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
    )


def attends(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` takes these."""
    return (
        library() is not None
        and query.dim() == key.dim() == value.dim() == 4
        and all(
            x.is_cpu and x.dtype is torch.float32 and x.numel() > 0 and x.stride(-1) == 1 for x in (query, key, value)
        )
        and of_one_kind(query, key, value)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 16 == 0
        and query.shape[-1] <= 256
        and not torch.is_autocast_enabled("cpu")
        and (_one_behind_another(query, key, mask) if says_rows(mask) else _whole_rows(query, key, mask))
    )


def says_rows(mask: Tensor | None) -> bool:
    """Whether what stands in a mask's place says instead where rows start that lie one behind the other."""
    return mask is not None and mask.dtype is torch.int64


def row_starts(queries: Int[Tensor, " R"], keys: Int[Tensor, " R"]) -> Int[Tensor, "1 1 2 R+1"]:
    """What `attend` is given in a mask's place where rows of so many queries and keys lie one behind the other.

    It has a mask's four dimensions, so that transformers hands it on as it is.
    """
    return torch.nn.functional.pad(torch.stack([queries, keys]).cumsum(1), (1, 0))[None, None]


def _one_behind_another(query: Tensor, key: Tensor, starts: Tensor | None) -> bool:
    if starts is None or not starts.is_cpu or starts.shape[:3] != (1, 1, 2) or len(query) != 1:
        return False
    lengths = starts.diff()[0, 0]
    return (
        starts.is_contiguous()
        and bool((starts[..., 0] == 0).all() and (lengths >= 0).all() and (lengths[1] <= LONGEST).all())
        and starts[0, 0, :, -1].tolist() == [query.shape[2], key.shape[2]]
    )


def _whole_rows(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    return key.shape[2] <= LONGEST and (
        mask is None
        or (mask.dtype is torch.bool and mask.is_cpu and mask.dim() == 4 and mask.stride(-1) == 1
            and mask.shape[1] == 1 and mask.shape[0] in (1, len(query))
            and mask.shape[2:] == (query.shape[2], key.shape[2]))
    )  # fmt: skip


def attend(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K L D"],
    value: Float[Tensor, "B K L D"],
    mask: Bool[Tensor, "b 1 T L"] | Int[Tensor, "1 1 2 R+1"] | None,
    scale: float,
) -> Float[Tensor, "B T H D"]:
    """softmax(scale q k^T) v over the keys where `mask` is True; without one, query i sees the keys up to i + L - T.

    With `row_starts` in the mask's place B is 1 and each row sees only itself, as it would alone and without a mask.
    H is a multiple of K, b is B or 1. A query that sees nothing gets zeros. First derivatives only.
    Source: arXiv 1706.03762, eq. 1.
    """
    if not scale > 0:  # the loops look for the largest product before they scale it
        query, scale = scale * query, 1.0
    return _Attend.apply(query, key, value, mask, scale)  # type: ignore[return-value]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        out = query.new_empty(len(query), query.shape[2], query.shape[1], query.shape[3])
        sums = query.new_empty(*query.shape[:3], 2)
        call = _call(query, key, value, mask, scale, out.transpose(1, 2), sums)
        loaded().attend_forward(ctypes.byref(call), torch.get_num_threads())
        saved = query.detach(), key.detach(), value.detach(), out.detach(), sums
        ctx.save_for_backward(mask, *saved)
        ctx.scale, ctx.shapes = scale, [x.shape for x in saved]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        mask, *saved = ctx.saved_tensors
        query, key, value, out, sums = map(as_saved, saved, ctx.shapes)
        grad = grad.contiguous()
        # token by token, heads side by side, as the projections before them want it
        grads = [x.new_empty(len(x), x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (query, key, value)]
        call = _call(query, key, value, mask, ctx.scale, out.transpose(1, 2), sums)
        call.grad_out = Strided.of(grad.transpose(1, 2))
        call.grad_query, call.grad_key, call.grad_value = map(Strided.of, grads)
        loaded().attend_backward(ctypes.byref(call), torch.get_num_threads())
        return *grads, None, None


def _call(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, out: Tensor, sums: Tensor
) -> Sequences:
    call = Sequences(*map(Strided.of, (query, key, value, out)), sums=sums.data_ptr(), scale=scale)
    call.batch, call.heads, call.queries, call.width = query.shape
    call.kv_heads, call.keys = key.shape[1:3]
    if says_rows(mask):
        assert mask is not None
        call.query_starts, call.key_starts = (x.data_ptr() for x in mask[0, 0])
        call.rows = mask.shape[-1] - 1
    elif mask is not None:
        call.mask, call.mask_query = mask.data_ptr(), mask.stride(2)
        call.mask_batch = 0 if len(mask) == 1 else mask.stride(0)
    return call
