"""The weights that a base and its adapters add up to, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from steersman.model.quantise import dense, is_quantised
from steersman.model.weight_files import Entry
from steersman.types import SteersmanError


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
def merged_state(model: nn.Module, *, with_adapters: bool = True) -> dict[str, Tensor]:
    """The state dict with every adapter added into its layer (without `with_adapters`: left out) and every quantised
    layer as its numbers, under the names of a plain model, in the precision of each layer.

    The model itself is left as it is: merging in place and undoing it would not give the same bits back. One layer at
    a time is widened.
    """
    return {
        name: _as_stored(make(), source) for name, source, make in merged_entries(model, with_adapters=with_adapters)
    }


def adapters_left_out(model: nn.Module) -> list[str]:
    """Names of the modules whose adapters `merged_entries` would add to no weight: of another kind than LoRA, or with
    more than a layer's weight to add to (a bias)."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    weights = set(model.state_dict(keep_vars=True))

    def left_out(name: str, module: nn.Module) -> bool:
        if isinstance(module, LoraLayer):
            biased = any(isinstance(part, nn.Linear) and part.bias is not None for part in module.lora_B.values())
            return biased or adapted_weight(name, module) not in weights
        if isinstance(module, AuxiliaryTrainingWrapper):
            return not isinstance(module, ModulesToSaveWrapper)
        return isinstance(module, BaseTunerLayer)

    return [name for name, module in model.named_modules() if left_out(name, module)]


def adapted_weight(name: str, layer: Any) -> str:
    """The name, in a state dict, of the weight that the adapters of a layer of this name add to. Several may lie
    around one module of experts, each for a matrix of it."""
    from peft.tuners.lora.layer import ParamWrapper

    leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    name, layer = f"{name}.base_layer", layer.base_layer
    while isinstance(layer, ParamWrapper):
        name, layer = f"{name}.base_layer", layer.base_layer
    return f"{name}.{leaf}"


def merged_entries(model: nn.Module, *, with_adapters: bool = True) -> Iterator[Entry]:
    """The weights of `merged_state`, each made when it is asked for, as exact as its sum is.

    Raises SteersmanError where an adapter would be added to none of them.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    if odd := adapters_left_out(model):
        raise SteersmanError(
            f"the adapters on {', '.join(odd[:3])} can not be merged here: they are not plain LoRA or DoRA on the "
            "weight of a layer or of experts; merge them with peft (merge_and_unload)"
        )
    special: dict[str, Callable[[], Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            place = adapted_weight(name, module)
            base: Any = module.get_base_layer()
            whole = merged_weight if with_adapters else lambda _, weight: weight
            leaf = place.rpartition(".")[2]
            special[place] = lambda layer=module, base=base, leaf=leaf, whole=whole: whole(
                layer, dense(base) if leaf == "weight" else getattr(base, leaf)
            )
        elif is_quantised(module):
            special.setdefault(f"{name}.weight", lambda module=module: dense(module))
    trained_whole = {name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" in name or _beside(name, special) or any(f"{n}.original_module." in name for n in trained_whole):
            continue
        plain = re.sub(r"(\.base_layer)+\.", ".", name).replace(".modules_to_save.default.", ".")
        if name in special:
            yield plain, torch.empty(0, dtype=tensor.dtype), torch.no_grad()(special[name])
        else:
            yield plain, tensor, tensor.detach


def _as_stored(made: Tensor, source: Tensor) -> Tensor:
    return made.to(source.dtype) if source.is_floating_point() else made


def _beside(name: str, special: dict[str, Any]) -> bool:
    """Whether an entry belongs to a quantised weight: its scales and tables."""
    parts = name.rsplit(".weight.", 1)
    return (len(parts) == 2 and f"{parts[0]}.weight" in special) or name.endswith((".SCB", ".weight_format"))
