"""The weights that a base and its adapters add up to, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from steersman.model.quantise import dense, is_quantised
from steersman.model.weight_files import Entry, in_dtype


def merged_weight(layer: Any, weight: Tensor) -> Tensor:
    """`weight`, the layer's own, with its active adapters added in; DoRA's scale it too (arXiv 2402.09353, eq. 5)."""
    for adapter in layer.active_adapters:
        variant = layer.lora_variant.get(adapter)
        if variant is None:
            weight = weight + layer.get_delta_weight(adapter)
        else:
            weight = variant.merge_safe(layer, adapter, weight)
    return weight


@torch.no_grad()
def merged_state(
    model: nn.Module, dtype: torch.dtype | None = None, *, with_adapters: bool = True
) -> dict[str, Tensor]:
    """The state dict with every adapter added into its layer (without `with_adapters`: left out) and every quantised
    layer as its numbers, under the names of a plain model, in `dtype` where one is given.

    The model itself is left as it is: merging in place and undoing it would not give the same bits back. One layer at
    a time is widened.
    """
    return {name: make() for name, _, make in merged_entries(model, dtype, with_adapters=with_adapters)}


def merged_entries(
    model: nn.Module, dtype: torch.dtype | None = None, *, with_adapters: bool = True
) -> Iterator[Entry]:
    """The weights of `merged_state`, each made when it is asked for."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    special: dict[str, Callable[[], Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            base: Any = module.get_base_layer()
            whole = merged_weight if with_adapters else lambda _, weight: weight
            special[f"{name}.base_layer.weight"] = lambda layer=module, base=base, whole=whole: whole(
                layer, dense(base)
            )
        elif is_quantised(module):
            special.setdefault(f"{name}.weight", lambda module=module: dense(module))
    trained_whole = {name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" in name or _beside(name, special) or any(f"{n}.original_module." in name for n in trained_whole):
            continue
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        if name in special:
            yield plain, torch.empty(0), lambda made=special[name], like=tensor: _merged(made, like, dtype)
        else:
            yield plain, tensor, lambda tensor=tensor: in_dtype(tensor.detach(), dtype)


@torch.no_grad()
def _merged(make: Callable[[], Tensor], like: Tensor, dtype: torch.dtype | None) -> Tensor:
    made = make()
    if made.is_floating_point() and dtype is not None:
        return made.to(dtype)
    return made.to(like.dtype) if like.is_floating_point() else made


def _beside(name: str, special: dict[str, Any]) -> bool:
    """Whether an entry belongs to a quantised weight: its scales and tables."""
    parts = name.rsplit(".weight.", 1)
    return (len(parts) == 2 and f"{parts[0]}.weight" in special) or name.endswith((".SCB", ".weight_format"))
