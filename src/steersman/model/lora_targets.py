"""Which weights of a model carry adapters: layers, the stacked matrices of experts, and never a router unasked.

transformers keeps the experts of a mixture as one tensor [experts, out, in] (or [experts, in, out]) for each of their
matrices, and often its router as a bare weight. These are no layers, so peft adapts them as weights
(`target_parameters`). For mixtures that once had a layer for each expert peft also takes the names of those layers
(`gate_proj`, `w1`, ...) for the tensors, wherever they stand; a layer that still has such a name, as that of a shared
expert, is given to peft as a weight too, which it can not mistake.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steersman.model.quantise import is_quantised
from steersman.types import SteersmanError

ALL_LINEAR = "all-linear"
EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (),
    "down_proj": (("w2",),),
    "weight": (),
}
"""Names of the experts' matrices, and of the layers that were one of them before experts were stacked."""
ROUTERS = ("gate", "router")


@dataclass(frozen=True, slots=True)
class Targets:
    """Where adapters go: layers (names, or a regular expression), single weights, and layers that stay without."""

    layers: str | list[str]
    weights: list[str]
    left_out: list[str]


def find_targets(model: nn.Module, targets: str | list[str]) -> Targets:
    """What `targets` (as in `LoraConfig`) name in the model. Raises SteersmanError where they name half of a matrix,
    or a quantised layer that peft can not adapt as a weight."""
    found, linear = _experts(model), _linear(model)
    left_out = _no_products(model) + _read_by_weight(model)
    mistaken = _mistaken(model, {_leaf(name) for name in linear})
    if not (found or mistaken):
        return Targets(targets, [], left_out)
    bare = _bare_routers(model)
    if targets == ALL_LINEAR:
        skip = {*left_out, *bare, *_plain_routers(model, found), *_outputs(model)}
        layers, weights = [name for name in linear if name not in skip], list(found)
    else:
        layers = [
            name
            for name, _ in named_modules(model)
            if _names(targets, name) and name not in left_out and name not in bare
        ]
        weights = [name for name in found if _names_matrix(targets, name)]
        weights += [f"{n}.weight" for n in bare if _names(targets, n) or _names(targets, f"{n}.weight")]
    for name in [name for name in layers if _leaf(name) in mistaken]:
        layers.remove(name)
        if not is_quantised(_module(model, name)):
            weights.append(f"{name}.weight")
        elif targets != ALL_LINEAR:
            raise SteersmanError(
                f"lora.targets {targets!r} name {name}, a quantised layer of a mixture of experts that peft takes "
                "for one of the experts; leave it out, or set model.quantise: none"
            )
    names = [name for name, _ in named_modules(model)]
    parameters = [f"{name}.{leaf}" for name, m in named_modules(model) for leaf in m._parameters]
    return Targets(_short(layers, names), _short(weights, parameters), [])


def adapted_names(model: nn.Module) -> set[str]:
    """The names of the layers and single weights that carry adapters."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    wrapped = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    return {
        f"{_plain(name)}.{m.parameter_name}" if isinstance(m, ParamWrapper) else _plain(name) for name, m in wrapped
    }


def named_targets(model: nn.Module, targets: str | list[str]) -> set[str]:
    """The names of the layers and single weights that `targets`, other than "all-linear", name; adapters may be on
    them already."""
    found = find_targets(model, targets)
    modules = [name for name, _ in named_modules(model) if name not in found.left_out]
    weights = [f"{name}.{leaf}" for name, m in named_modules(model) for leaf in m._parameters]
    return {n for n in modules if _names(found.layers, n)} | {n for n in weights if _names(found.weights, n)}


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's own modules, without adapters and by the names that they have without them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (_plain(name), m)
        for name, m in model.named_modules()
        if not isinstance(m, BaseTunerLayer) and ".lora_" not in name
    ]


def _plain(name: str) -> str:
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _module(model: nn.Module, name: str) -> nn.Module:
    return dict(named_modules(model))[name]


def _linear(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    return [name for name, m in named_modules(model) if isinstance(m, nn.Linear | Conv1D)]


def _outputs(model: Any) -> list[str]:
    """The name of the output layer, where there is one."""
    from transformers import PreTrainedModel

    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [name for name, m in model.named_modules() if output is not None and m is output]


def _experts(model: nn.Module) -> dict[str, int]:
    """The stacked matrices of experts by name, and how many experts each holds."""
    return {
        f"{name}.{leaf}": p.shape[0]
        for name, m in named_modules(model)
        for leaf, p in m._parameters.items()
        if p is not None and leaf in EXPERTS and p.ndim == 3 and p.is_floating_point() and "num_experts" in vars(m)
    }


def _bare_routers(model: nn.Module) -> list[str]:
    """Routers that are a weight in a module of their own and no layer."""
    return [
        name
        for name, m in named_modules(model)
        if _leaf(name) in ROUTERS
        and not isinstance(m, nn.Linear)
        and (weight := m._parameters.get("weight")) is not None
        and weight.ndim == 2
    ]


def _plain_routers(model: nn.Module, experts: dict[str, int]) -> list[str]:
    """Linear layers that choose among experts."""
    counts = set(experts.values())
    return [
        name
        for name, m in named_modules(model)
        if isinstance(m, nn.Linear) and m.out_features in counts and set(ROUTERS) & set(name.split("."))
    ]


def _names(targets: str | list[str], name: str) -> bool:
    """Whether targets name a module or weight, by peft's rules."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _names_matrix(targets: str | list[str], name: str) -> bool:
    """Whether targets name a stacked matrix, by its own name or by those of the layers that it was."""
    if _names(targets, name):
        return True
    place, _, leaf = name.rpartition(".")
    for former in EXPERTS[leaf]:
        given = [part for part in former if _names(targets, f"{place}.{part}")]
        if len(given) == len(former):
            return True
        if given:
            raise SteersmanError(
                f"lora.targets {targets!r} name {', '.join(given)} of the experts in {place} without "
                f"{', '.join(part for part in former if part not in given)}, which lies in the same matrix {leaf}; "
                f"name {leaf}, or both"
            )
    return False


def _mistaken(model: Any, leaves: Iterable[str]) -> list[str]:
    """The names of layers that peft would take for those of experts in this model."""
    import peft

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # before 0.19
        return []
    out = []
    for leaf in leaves:
        config = peft.LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it wants the other half of a matrix
            out.append(leaf)
        else:
            out += [] if leaf in (config.target_modules or ()) else [leaf]
    return out


def _short(names: list[str], there: list[str]) -> list[str]:
    """The names by their last parts, where these name just the same among all that are there."""
    by_end: dict[str, set[str]] = {}
    for name in names:
        by_end.setdefault(_end(name), set()).add(name)
    out: list[str] = []
    for end, wanted in by_end.items():
        same = {name for name in there if _names([end], name)}
        out += [end] if same == wanted else sorted(wanted)
    return sorted(out)


def _end(name: str) -> str:
    """The last part of a name, with the one before it where the last is what every layer's weight is called."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1] == "weight" or "experts" in parts[-2:-1] else parts[-1]


def _no_products(model: nn.Module) -> list[str]:
    """Linear layers to which a family gave a forward pass that is no plain product, such as a router that gives
    indices too: an adapter can not be added to that."""
    return [
        name
        for name, module in named_modules(model)
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith("transformers.models.")
        and not _is_product(module)
    ]


def _read_by_weight(model: nn.Module) -> list[str]:
    """Layers of Mamba's mixers of which kernels read the weight alone: an adapter beside it would do nothing."""
    return [
        f"{name}.{part}"
        for name, mixer in named_modules(model)
        if isinstance(getattr(mixer, "conv1d", None), nn.Conv1d)
        and isinstance(getattr(mixer, "D", None), nn.Parameter)
        for part in ("out_proj", "dt_proj")
        if isinstance(getattr(mixer, part, None), nn.Linear)
    ]


@torch.no_grad()
def _is_product(module: nn.Linear) -> bool:
    """Whether the layer gives the product of its input and its weight, plus its bias. One without weights is asked
    with some."""
    if module.weight.is_meta:
        module = copy.deepcopy(module).to_empty(device="cpu")
        for p in module.parameters():
            p.copy_(torch.linspace(-1.0, 1.0, p.numel(), device="cpu").view_as(p))
    x = torch.linspace(-1.0, 1.0, module.in_features, device="cpu").to(module.weight)[None]
    try:
        found = module(x)
    except (TypeError, ValueError, RuntimeError):  # it takes more than one input, or another shape
        return False
    wanted = nn.functional.linear(x, module.weight, module.bias)
    return (
        torch.is_tensor(found) and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-2, atol=1e-3)
    )
