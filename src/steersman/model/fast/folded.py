"""Adapters added into their layers for as long as a model generates: one product in the place of three.

Training keeps base and adapters apart; a step of decoding reads every weight for a few rows and pays for each
operation that it starts. While weights stand still, W + (alpha / r) B A is one matrix, the model has plain layers
again, and what is compiled for plain layers takes them. The base is not written to: each layer lends its place to
a copy with other weights, so that undoing it is exact.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steersman.model.merge import merged_weight

WIDE = (torch.float32, torch.float64)
"""Precisions in which the sum of base and adapter is as good as computing both; a half precision would round away
what the adapters have learned, and quantised weights have no sum."""


@contextmanager
def folded(model: Any) -> Iterator[None]:
    """Lets each layer with adapters be a plain one with their sum, and puts the layers back.

    Memory: `folded_bytes`. Weights must not change meanwhile. Layers in half precision, quantised ones and those of
    which the adapters are more than a sum stay as they are.
    """
    layers = list(_layers(model))
    try:
        for parent, name, layer in layers:
            parent._modules[name] = _sum(layer)
        yield
    finally:
        for parent, name, layer in layers:
            parent._modules[name] = layer


def folded_bytes(model: Any) -> int:
    """Bytes of the sums that `folded` holds: the weights of all layers that it stands in for."""
    weights = [layer.get_base_layer().weight for _, _, layer in _layers(model)]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _layers(model: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """Every layer with adapters that can be added in, with its parent and its name there."""
    if "peft" not in sys.modules:  # so nothing here has adapters, and importing it takes seconds
        return
    from peft.tuners.lora.layer import Embedding, Linear

    for parent in list(model.modules()):
        for name, layer in parent._modules.items():
            if isinstance(layer, (Linear, Embedding)) and _adds(layer):
                yield parent, name, layer


def _adds(layer: Any) -> bool:
    weight = layer.get_base_layer().weight
    return type(weight) is nn.Parameter and weight.dtype in WIDE and not layer.merged


def _sum(layer: Any) -> nn.Module:
    """The base layer with the adapters that are on now added into a copy of its weight."""
    base = layer.get_base_layer()
    if layer.disable_adapters:
        return base
    with torch.no_grad():
        return _with_weight(base, nn.Parameter(merged_weight(layer, base.weight), requires_grad=False))


def _with_weight(base: nn.Module, weight: Tensor) -> nn.Module:
    """A second module of the same kind that shares all but its weight."""
    other = type(base).__new__(type(base))
    other.__dict__ = {**vars(base), "_parameters": {**base._parameters, "weight": weight}}
    return other
