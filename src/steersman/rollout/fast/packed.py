"""Weights laid out beforehand for products of as many rows as are decoded together, on a CPU.

While a model generates its weights do not change, so they are rearranged once (`native.products`); the price is a
second copy for as long as the call lasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steersman import native
from steersman.model.fast.folded import folded, widened_weights
from steersman.model.fast.linear import LINEAR
from steersman.native.products import Panels, panel_bytes, product, rearrange
from steersman.ops.heap import give_back

STEPS, BYTES = 32, 1 << 30
"""Fewer steps than these do not earn the rearranging, nor the adding of adapters; larger models keep one copy of
their weights."""
LARGE = 64 << 20
"""Bytes of weights from which a call begins with the heap cleared: that takes some milliseconds."""
ROWS = 256
"""Products of more rows, such as a prefill's, are the library's: there it is as fast."""


def lasts(steps: int) -> bool:
    """Whether a call has steps enough to earn weights that are made for it."""
    return steps >= STEPS


def clears(model: Any, steps: int) -> bool:
    """Whether a call of so many steps first gives back what lies free in the C library's heap, where little of what
    it makes would fit, and at its end what it leaves there."""
    return lasts(steps) and next(model.parameters()).is_cpu and _size(model) >= LARGE


def pays(model: Any, steps: int) -> bool:
    """Whether a second copy of the model's weights is small enough, and used often enough."""
    return native.library() is not None and lasts(steps) and _size(model) <= BYTES


def _size(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@contextmanager
def for_call(model: Any, steps: int) -> Iterator[None]:
    """While open, adapters are added into their layers where the call earns it. Clears the heap before and after, if
    the call `clears` it."""
    clear = give_back if clears(model, steps) else lambda: None
    clear()
    with folded(model) if lasts(steps) else nullcontext():
        yield
    clear()


def packed_bytes(model: Any, steps: int) -> int:
    """Bytes of the second copy that a call of so many steps makes: all its linear layers, the output layer too, and
    those of 4 bits that are plain ones meanwhile."""
    if not pays(model, steps):
        return 0
    weights = [module.weight for module in model.modules() if _plain(module)]
    return panel_bytes([*weights, *widened_weights(model)])


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Lets the model's linear layers use rearranged weights for inputs of few rows, and puts everything back."""
    layers = [module for module in model.modules() if _plain(module)]
    try:
        for layer, weight in zip(layers, rearrange([layer.weight for layer in layers]), strict=True):
            layer.forward = partial(_linear, layer, weight)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _plain(module: nn.Module) -> bool:
    """A linear layer of its own float32 weights on the CPU, called as it stands."""
    return (
        isinstance(module, nn.Linear)
        and type(module) in LINEAR
        and type(module.weight) is nn.Parameter
        and module.weight.is_cpu
        and module.weight.dtype == torch.float32
        and module.weight.numel() > 0
        and (module.bias is None or _bias_fits(module.bias, len(module.weight)))
        and "forward" not in vars(module)
    )


def _bias_fits(bias: Tensor, outputs: int) -> bool:
    return bias.is_cpu and bias.dtype == torch.float32 and bias.shape == (outputs,) and bias.is_contiguous()


def _linear(layer: nn.Linear, weight: Panels, x: Tensor) -> Tensor:
    if (
        x.numel() > ROWS * layer.in_features
        or x.dtype != torch.float32
        or x.shape[-1] != weight.inputs
        or not x.is_cpu
        or not (layer.bias is None or _bias_fits(layer.bias, weight.outputs))
    ):
        return type(layer).forward(layer, x)
    return product(x, weight, None if layer.bias is None else layer.bias.detach())
