"""Norm, gate and rotation of a transformer's layer in one pass each, with their gradients; float32 on a CPU.

Each keeps for the backward pass only what it was given (and one number per row), where plain torch keeps what lies
between as well. What norm and gate gave can be computed again from that (`ops.recompute`). First derivatives only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from steersman.native import library, loaded
from steersman.ops.recompute import keep, recomputable, take

GATES = {"silu": 0, "gelu_tanh": 1}


def takes(x: Tensor) -> bool:
    """Whether the compiled loops are there and work on this tensor, here and now."""
    return x.dtype is torch.float32 and x.is_cpu and not torch.is_autocast_enabled("cpu") and library() is not None


def norms(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes these: one weight for each number of a row."""
    return takes(x) and takes(weight) and x.dim() > 0 and weight.shape == x.shape[-1:] and x.shape[-1] > 0


def gates(gate: Tensor, up: Tensor) -> bool:
    """Whether `gated` takes these; torch would broadcast or convert what is unlike."""
    return takes(gate) and takes(up) and gate.shape == up.shape


def rotates(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes these: an angle for each position and number, for each row or for all."""
    return (
        all(map(takes, (x, cos, sin)))
        and x.dim() == 4
        and cos.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[1:] == (x.shape[2], x.shape[3])
        and cos.shape[0] in (1, x.shape[0])
        and x.shape[3] % 2 == 0
        and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
    )


def rms_norm(x: Float[Tensor, "*lead H"], weight: Float[Tensor, " H"], eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight). Source: arXiv 1910.07467, eq. 4."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Norm.apply(x, weight, eps, offset)  # type: ignore[return-value]
    return _norm(x.contiguous(), weight.detach().contiguous(), eps, offset)[0]


def gated(gate: Float[Tensor, "*lead I"], up: Float[Tensor, "*lead I"], kind: str = "silu") -> Tensor:
    """act(gate) * up, with act SiLU or the tanh form of GELU. Source: arXiv 2002.05202, eq. 6."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gate.apply(gate, up, GATES[kind])  # type: ignore[return-value]
    return _gate(gate.contiguous(), up.contiguous(), GATES[kind])


def rotate(x: Float[Tensor, "B H L D"], cos: Float[Tensor, "b L D"], sin: Float[Tensor, "b L D"]) -> Tensor:
    """x cos + rotate_half(x) sin, the rotary position embedding; b is B or 1. Source: arXiv 2104.09864, eq. 34."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, sin)  # type: ignore[return-value]
    return _rotate(x, cos, sin, back=False)


def as_saved(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor saved for the backward pass, if it came back as it went in; RuntimeError where a hook changed it.

    What is saved is detached, so that it stays what it was when a parameter's data are replaced in the meantime.
    """
    if x.dtype is not torch.float32 or not x.is_cpu or x.shape != shape:
        raise RuntimeError(
            f"saved for the backward pass as float32 {list(shape)} on the CPU, given back by a hook as {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )
    return x


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        x, weight = x.detach().contiguous(), weight.detach().contiguous()
        out, inverse = _norm(x, weight, eps, offset)
        keep(ctx, x, weight, inverse)
        ctx.eps, ctx.offset = eps, offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = take(ctx)
        x, weight = as_saved(x, grad.shape).contiguous(), as_saved(weight, grad.shape[-1:]).contiguous()
        inverse = as_saved(inverse, grad.shape[:-1]).contiguous()
        width, threads = x.shape[-1], torch.get_num_threads()
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        partial = x.new_empty(threads, width)
        loaded().norm_backward(
            grad.data_ptr(), x.data_ptr(), weight.data_ptr(), ctx.offset, inverse.data_ptr(), grad_x.data_ptr(),
            0 if grad_weight is None else grad_weight.data_ptr(), partial.data_ptr(), inverse.numel(), width, threads,
        )  # fmt: skip
        return grad_x, grad_weight, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kind):
        gate, up = gate.detach().contiguous(), up.detach().contiguous()
        keep(ctx, gate, up)
        ctx.kind = kind
        return _gate(gate, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = (as_saved(x, grad.shape).contiguous() for x in take(ctx))
        grad, grad_gate, grad_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        loaded().gate_back(
            grad.data_ptr(), gate.data_ptr(), up.data_ptr(), grad_gate.data_ptr(), grad_up.data_ptr(), gate.numel(),
            ctx.kind, torch.get_num_threads(),
        )  # fmt: skip
        return grad_gate, grad_up, None


def _norm_again(ctx: Any, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    x = as_saved(x, (*inverse.shape, len(weight))).contiguous()
    return _norm(x, as_saved(weight, weight.shape).contiguous(), ctx.eps, ctx.offset)[0]


def _gate_again(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
    return _gate(as_saved(gate, up.shape).contiguous(), as_saved(up, gate.shape).contiguous(), ctx.kind)


recomputable(_Norm, _norm_again)
recomputable(_Gate, _gate_again)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos.detach(), sin.detach())
        ctx.angles = cos.shape
        return _rotate(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = (as_saved(angles, ctx.angles) for angles in ctx.saved_tensors)
        return _rotate(grad, cos, sin, back=True), None, None


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
    loaded().norm_forward(
        x.data_ptr(), weight.data_ptr(), offset, eps, out.data_ptr(), inverse.data_ptr(), inverse.numel(),
        x.shape[-1], torch.get_num_threads(),
    )  # fmt: skip
    return out, inverse


def _gate(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    out = torch.empty_like(gate)
    loaded().gate(
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), kind, torch.get_num_threads()
    )  # fmt: skip
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    sizes = (ctypes.c_int64 * 12)(
        *x.shape, *x.stride()[:3], *out.stride()[:3], 0 if len(cos) == 1 else cos.stride(0), cos.stride(1)
    )
    loaded().rotate(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), sizes, back, torch.get_num_threads()
    )  # fmt: skip
    return out
