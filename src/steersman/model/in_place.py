"""Adapters added into what their layer gives, in place: no tensor of the layer's width is made and thrown away.

peft computes y + (x A^T B^T) s as four tensors of y's size, three of which are freed at once, and as five where the
base is in 4 bits. On a CPU their places lie between those that the backward pass needs, and the C library can not
give a freed place to a tensor of the same size (it aligns blocks by asking for more than it hands out), so each of
them stays with the process: a model of 135M parameters took twice the memory that its tensors have.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from steersman.model.fast.linear import LINEAR, quicken_linear
from steersman.model.module_forward import ModuleForward
from steersman.model.quantise import is_quantised

KINDS = {(adapted, kind.__name__, "Parameter") for adapted in ("Linear", "ParamWrapper") for kind in LINEAR}
KINDS |= {("Linear4bit", "Linear4bit", "Params4bit")}
"""Layers whose output no other tensor shares memory with, so that it may be added to. A `ParamWrapper` would add B A
into the weight of its layer at every call, and past what stands in for that layer while a model samples."""
HALF = (torch.bfloat16, torch.float16)


def add_in_place(model: nn.Module) -> None:
    """Lets every linear layer with adapters, plain or in 4 bits, compute y = W x + s B A x in one tensor of y's size.

    The adapters' own matrices become fast layers too, which do not keep what a norm or a gate gave them. Where the
    base computes in half precision, so do float32 adapters: their products take A and B rounded, as under autocast,
    and no layer keeps a float32 copy of its input; gradients and updates are those of the float32 matrices. Layers
    of other kinds, with other adapters (DoRA), sharded or merged do what peft does.
    """
    if "peft" not in sys.modules:
        return
    from peft.tuners.lora.layer import LoraLayer

    for module in list(model.modules()):
        if isinstance(module, LoraLayer) and _kinds(module) in KINDS:
            quicken_linear(module)
            module.forward = ModuleForward(_forward, module)


def _kinds(layer: Any) -> tuple[str, str, str]:
    """What peft calls the layer, and torch or bitsandbytes its base and the base's weight."""
    base = layer.get_base_layer()
    return type(layer).__name__, type(base).__name__, type(base._parameters.get("weight")).__name__


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`x` is [..., in]; the result [..., out]."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if args or kwargs or layer.disable_adapters or layer.merged or not all(_plain(layer, n, x) for n in names):
        return type(layer).forward(layer, x, *args, **kwargs)
    rows = x.flatten(0, -2)
    out = layer.base_layer(rows)
    for name in names:
        first, read = layer.lora_A[name], layer.lora_dropout[name](rows)
        low = first(read) if first.weight.dtype == x.dtype else functional.linear(read, first.weight.to(x.dtype))
        out = out.addmm_(low, layer.lora_B[name].weight.to(x.dtype).t(), alpha=layer.scaling[name])
    return out.unflatten(0, x.shape[:-1])


def _plain(layer: Any, name: str, x: Tensor) -> bool:
    """Whether the adapter is two matrices, of the base's precision or of float32 on a base in half precision, and
    nothing more."""
    base = layer.base_layer.weight
    adapters = [layer.lora_A[name].weight, layer.lora_B[name].weight]
    wider = {torch.float32} if x.dtype in HALF else set()
    return (
        name not in layer.lora_variant
        and layer.lora_B[name].bias is None
        and (is_quantised(layer.base_layer) or (type(base) is nn.Parameter and base.dtype == x.dtype))
        and all(type(w) is nn.Parameter and w.dtype in {x.dtype} | wider for w in adapters)
    )
