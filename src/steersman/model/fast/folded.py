"""Adapters added into their layers for as long as a model generates: one product in the place of three. On a CPU the
weights of 4-bit layers too are held as the numbers that they stand for, where there is room.

Training keeps base and adapters apart; a step of decoding reads every weight for a few rows and pays for each
operation that it starts, and 4-bit weights are widened anew for each product. While weights stand still,
W + (alpha / r) B A is one matrix, the model has plain layers again, and what is compiled for plain layers takes them.
The base is not written to: each layer lends its place to another one, so that undoing it is exact.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steersman.model.merge import merged_weight
from steersman.model.quantise import dense, dense_bytes, is_narrow

WIDE = (torch.float32, torch.float64)
"""Precisions in which the sum of base and adapter is as good as computing both; a half precision would round away
what the adapters have learned."""
ROOM = 1 << 30
"""The most bytes that widened 4-bit weights may take: whoever quantises a larger model does so for want of memory."""


@contextmanager
def folded(model: Any) -> Iterator[None]:
    """Lets each layer with adapters be a plain one with their sum, and puts the layers back.

    Memory: `folded_bytes`. Weights must not change meanwhile. Layers in half precision, those of which the adapters
    are more than a sum, and quantised ones stay as they are, but for 4-bit ones on a CPU, whose products are those of
    float32 weights: these become plain layers with or without adapters, where all of them fit into ROOM.
    """
    layers = _layers(model)
    try:
        for parent, name, layer, base in layers:
            parent._modules[name] = _sum(layer, base)
        yield
    finally:
        for parent, name, layer, _ in layers:
            parent._modules[name] = layer


def folded_bytes(model: Any) -> int:
    """Bytes of the sums that `folded` holds: the weights of all layers that it stands in for."""
    return sum(_bytes(base) for *_, base in _layers(model))


def widened_weights(model: Any) -> list[Tensor]:
    """The shapes, without numbers, of the 4-bit layers that `folded` makes plain."""
    narrow = [base for *_, base in _layers(model) if is_narrow(base)]
    return [torch.empty(base.out_features, base.in_features, device="meta") for base in narrow]


def _layers(model: Any) -> list[tuple[nn.Module, str, Any, Any]]:
    """Every layer that can be a plain one: its parent, its name there, and the layer with and without adapters."""
    kinds = _kinds_with_adapters()
    places = [(parent, name, layer) for parent in model.modules() for name, layer in parent._modules.items()]
    found = [(*place, place[2].get_base_layer()) for place in places if isinstance(place[2], kinds)]
    inside = {base for *_, base in found}
    found += [(*place, place[2]) for place in places if is_narrow(place[2]) and place[2] not in inside]
    room = sum(_bytes(base) for *_, base in found if is_narrow(base)) <= ROOM
    return [one for one in found if _adds(one[2], one[3], room)]


def _kinds_with_adapters() -> tuple[type, ...]:
    if "peft" not in sys.modules:  # so nothing here has adapters, and importing it takes seconds
        return ()
    from peft.tuners.lora.layer import Embedding, Linear

    quantised = sys.modules.get("peft.tuners.lora.bnb")
    return (Linear, Embedding) if quantised is None else (Linear, Embedding, quantised.Linear4bit)


def _adds(layer: Any, base: Any, room: bool) -> bool:
    wide = type(base.weight) is nn.Parameter and base.weight.dtype in WIDE
    return (wide or (room and is_narrow(base))) and (layer is base or not layer.merged)


def _bytes(base: Any) -> int:
    return dense_bytes(base) if is_narrow(base) else base.weight.numel() * base.weight.element_size()


def _sum(layer: Any, base: Any) -> nn.Module:
    """The base layer with the adapters that are on now added into a copy of its weight."""
    off = layer is base or layer.disable_adapters
    if off and not is_narrow(base):
        return base
    with torch.no_grad():
        weight = dense(base) if off else merged_weight(layer, dense(base))
    parameter = nn.Parameter(weight, requires_grad=False)
    return _plain(base, parameter) if is_narrow(base) else _with_weight(base, parameter)


def _plain(base: Any, weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    layer._parameters.update(weight=weight, bias=base.bias)
    return layer.train(base.training)


def _with_weight(base: nn.Module, weight: Tensor) -> nn.Module:
    """A second module of the same kind that shares all but its weight."""
    other = type(base).__new__(type(base))
    other.__dict__ = {**vars(base), "_parameters": {**base._parameters, "weight": weight}}
    return other
