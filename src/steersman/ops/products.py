"""Large products of float32 matrices on a CPU, by the faster of the two libraries that torch brings.

torch multiplies float32 matrices with MKL, which uses the widest instructions of its maker's processors only. oneDNN,
which torch uses for convolutions and half precision, uses what any processor has: on AMD processors with AVX-512 it
takes from a quarter to nine tenths of the time. Small products stay with MKL, since a call of oneDNN costs more.

A product whose input is a norm's or a gate's output does not keep that for the gradient of its weight, but has it
computed again (`ops.recompute`), whichever library multiplies.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from steersman.ops.heap import freed
from steersman.ops.recompute import maker, output

MIN_ONEDNN_PRODUCT = 1 << 22
"""Multiplications from which a product is given to oneDNN: below, its start costs more than it saves."""
MIN_RECOMPUTED = 1 << 18
"""Numbers from which an input is computed again and not kept: below, it is not worth its time."""
PLAIN = (Tensor, nn.Parameter)


def linear(x: Float[Tensor, "*lead I"], weight: Float[Tensor, "O I"], bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, [*lead, O], as torch's own.

    Differentiable once where the product is large, or its input is and can be computed again.
    """
    if not (takes(x, weight) and (_much(x, weight) or x.numel() >= MIN_RECOMPUTED)):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or _learns(bias)):
        made_by = maker(x) if weight.requires_grad else None
        if made_by is not None or faster(x, weight):
            return _Linear.apply(x, weight, bias, made_by)  # type: ignore[return-value]
    return _multiply(x, weight, bias)


def add_product(out: Float[Tensor, "M N"], a: Float[Tensor, "M K"], b: Float[Tensor, "K N"]) -> None:
    """out += a b, in place and without a gradient."""
    if faster(a, b.t()):
        out.add_(_multiply(a, b.t(), None))
    else:
        out.addmm_(a, b)


def faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN should compute x weight^T here: a large product on a processor that MKL does not know."""
    return available() and _much(x, weight) and takes(x, weight)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x weight^T is a product of plain float32 matrices on the CPU.

    Sharded, traced and otherwise wrapped tensors are torch's, and so is all that runs under autocast.
    """
    return (
        x.dtype == torch.float32 == weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and x.shape[-1] == weight.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def available() -> bool:
    """Whether there are products here that oneDNN computes faster."""
    return _entry() is not None


class _Linear(torch.autograd.Function):
    """The product and its first derivative; what that does not need, or `made_by` computes again, is not kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, made_by):
        of_x, of_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight and made_by is None else None, weight if of_x else None)
        ctx.made_by = made_by
        if made_by is not None:
            freed(x.nbytes)  # as soon as its last reader has it
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        x = x if ctx.made_by is None else output(ctx.made_by)
        grad = grad.contiguous()
        freed(grad.nbytes, growing=False)  # about what the layer's activations take
        rows = grad.view(-1, grad.shape[-1])
        return (
            _multiply(grad, weight.t(), None) if of_x else None,
            _multiply(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
        )


def _learns(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def _much(x: Tensor, weight: Tensor) -> bool:
    return x.numel() * weight.shape[0] >= MIN_ONEDNN_PRODUCT


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    entry = _entry() if _much(x, weight) else None
    return functional.linear(x, weight, bias) if entry is None else entry(x, weight, bias, "none", [], "")


@cache
def _entry() -> Callable[..., Tensor] | None:
    """torch's way into oneDNN's product, where it is the faster one; None where it is not, or is not there."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (wide and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return None
    if _vendor() in ("GenuineIntel", ""):
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise
    except AttributeError:  # torch promises nothing about this name
        return None


def _vendor() -> str:
    """The processor's maker as it calls itself; empty where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not cpuinfo.exists():
        return ""
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "vendor_id"), "")
