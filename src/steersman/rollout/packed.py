"""Weights laid out beforehand for products of as many rows as are decoded together, on a CPU.

A product of 64 rows spends a fifth of its time on rearranging the weights. While a model generates they do not
change, so MKL rearranges them once; the price is a second copy for as long as the call lasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steersman import native

ROWS, STEPS, BYTES = 16, 32, 1 << 30
"""Fewer rows or steps than these do not earn the rearranging; larger models keep one copy of their weights."""


@contextmanager
def packed(model: Any, rows: int, steps: int) -> Iterator[None]:
    """Lets the model's linear layers use rearranged weights for inputs of `rows` rows, and puts everything back."""
    layers = [module for module in model.modules() if _plain(module)]
    size = sum(layer.weight.numel() * 4 for layer in layers)
    if not _available() or rows < ROWS or steps < STEPS or size > BYTES:
        yield
        return
    try:
        for layer in layers:
            weight = torch.ops.mkl._mkl_reorder_linear_weight(layer.weight.detach(), rows)
            layer.forward = partial(_linear, layer, weight, rows)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _plain(module: nn.Module) -> bool:
    """A linear layer of its own float32 weights on the CPU, called as it stands."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.is_cpu
        and module.weight.dtype == torch.float32
        and "forward" not in vars(module)
    )


def _available() -> bool:
    """Whether torch has MKL's packed products here; STEERSMAN_NATIVE=0 turns them off with the compiled loops."""
    return (
        torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear") and native.library() is not None
    )


def _linear(layer: nn.Linear, weight: Tensor, rows: int, x: Tensor) -> Tensor:
    if x.numel() != rows * layer.in_features or x.dtype != torch.float32:
        return nn.Linear.forward(layer, x)
    return torch.ops.mkl._mkl_linear(x, weight, layer.weight, layer.bias, rows)
