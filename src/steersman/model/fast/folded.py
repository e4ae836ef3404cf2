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

FOLDABLE_DTYPES = (torch.float32, torch.float64)
"""Precisions in which the sum of base and adapter is as good as computing both; a half precision would round away
what the adapters have learned."""
MAX_WIDENED_BYTES = 1 << 30
"""The most bytes that widened 4-bit weights may take: whoever quantises a larger model does so for want of memory."""


@contextmanager
def folded(model: Any) -> Iterator[None]:
    """Lets each layer with adapters be a plain one with their sum, and puts the layers back.

    Memory: `folded_bytes`. Weights must not change meanwhile. Layers in half precision, those of which the adapters
    are more than a sum, and quantised ones stay as they are, but for 4-bit ones on a CPU, whose products are those of
    float32 weights: these become plain layers with or without adapters, where all of them fit into MAX_WIDENED_BYTES.
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
    return sum(_bytes(layer, base) for *_, layer, base in _layers(model))


def widened_weights(model: Any) -> list[Tensor]:
    """The shapes, without numbers, of the 4-bit layers that `folded` makes plain."""
    narrow = [base for *_, base in _layers(model) if is_narrow(base)]
    return [torch.empty(base.out_features, base.in_features, device="meta") for base in narrow]


def _layers(model: Any) -> list[tuple[nn.Module, str, Any, Any]]:
    """Every layer that can be a plain one: its parent, its name there, and the layer with and without adapters."""
    kinds = _kinds_with_adapters()
    outer = [m for m in model.modules() if not isinstance(m, _kinds_around_weights())]
    places = [(parent, name, layer) for parent in outer for name, layer in parent._modules.items()]
    found = [(*place, place[2].get_base_layer()) for place in places if isinstance(place[2], kinds)]
    inside = {base for *_, base in found}
    found += [(*place, place[2]) for place in places if is_narrow(place[2]) and place[2] not in inside]
    room = sum(dense_bytes(base) for *_, base in found if is_narrow(base)) <= MAX_WIDENED_BYTES
    return [one for one in found if _adds(one[2], one[3], room)]


def _kinds_with_adapters() -> tuple[type, ...]:
    if "peft" not in sys.modules:  # so nothing here has adapters, and importing it takes seconds
        return ()
    from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper

    quantised = sys.modules.get("peft.tuners.lora.bnb")
    kinds = (Linear, Embedding, ParamWrapper)
    return kinds if quantised is None else (*kinds, quantised.Linear4bit)


def _kinds_around_weights() -> tuple[type, ...]:
    """What has the adapters of one weight of a module; several may lie around each other."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.lora.layer import ParamWrapper

    return (ParamWrapper,)


def _adapted(layer: Any, base: Any) -> dict[str, Any]:
    """The weights of the base that have adapters, by name, with the layer that has them; else its weight and None."""
    found = {}
    while isinstance(layer, _kinds_around_weights()):
        found[layer.parameter_name] = layer
        layer = layer.base_layer
    return found or {"weight": layer if layer is not base else None}


def _adds(layer: Any, base: Any, room: bool) -> bool:
    weights = [base._parameters[name] for name in _adapted(layer, base)]
    wide = all(type(weight) is nn.Parameter and weight.dtype in FOLDABLE_DTYPES for weight in weights)
    return (wide or (room and is_narrow(base))) and (layer is base or not layer.merged)


def _bytes(layer: Any, base: Any) -> int:
    if is_narrow(base):
        return dense_bytes(base)
    return sum(base._parameters[name].nbytes for name in _adapted(layer, base))


def _sum(layer: Any, base: Any) -> nn.Module:
    """The base layer with the adapters that are on now added into a copy of its weights."""
    off = layer is base or layer.disable_adapters
    if off and not is_narrow(base):
        return base
    with torch.no_grad():
        weights = {
            name: nn.Parameter(_one_sum(None if off else around, base, name), requires_grad=False)
            for name, around in _adapted(layer, base).items()
        }
    return _plain(base, weights["weight"]) if is_narrow(base) else _with_weights(base, weights)


def _one_sum(layer: Any, base: Any, name: str) -> Tensor:
    weight = dense(base) if name == "weight" else base._parameters[name]
    return weight if layer is None else merged_weight(layer, weight)


def _plain(base: Any, weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    layer._parameters.update(weight=weight, bias=base.bias)
    return layer.train(base.training)


def _with_weights(base: nn.Module, weights: dict[str, nn.Parameter]) -> nn.Module:
    """A second module of the same kind that shares all but these weights."""
    other = type(base).__new__(type(base))
    other.__dict__ = {**vars(base), "_parameters": {**base._parameters, **weights}}
    return other
