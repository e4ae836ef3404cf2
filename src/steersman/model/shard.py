"""Weights in pieces over the ranks: PyTorch's FSDP2, or DeepSpeed's ZeRO 3, under policies and scalar models.

The wrapped class itself is the root, since the loops call `logp`, `hidden`, `value` and `score` and not `forward`.
A sharded model makes one run of its trunk in each call, whatever the lengths and shared prompts of its rows, because
every rank must come to each layer equally often.

Source: `fully_shard`, PyTorch 2.6 and newer; for DeepSpeed see `zero_layers`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from steersman.distributed.ranks import ranks
from steersman.model.zero_layers import LayerByLayer
from steersman.types import SteersmanError, Tokens


def place(model: Any) -> None:
    """Lays a policy's or scalar model's weights in pieces over the ranks, in place, where `parallel.mode` is fsdp or
    zero3.

    Gradients are summed, not averaged: losses carry the whole batch's denominator already. Raises SteersmanError
    where the ranks do not divide into `parallel.replicas`, or the model does not say which blocks are its layers.
    """
    if not ranks().sharded:
        return
    if ranks().parallel.stage:
        _cut[model] = LayerByLayer(model, layers(model.model), model.runs)
    else:
        _shard(model)
    model.max_tokens = None
    model.reader.run_once_per_call()
    with torch.no_grad():  # hooks are laid at the first run, which an engine must not be
        getattr(model, model.runs[0])(Tokens.from_ids([[0]], [[0]]))
    as_local_shards(model)


def _shard(model: Any) -> None:
    from torch.distributed import fsdp

    # Of the states that a run gives, which are views: nothing here changes them in place.
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \(FSDP{type(model).__name__}\) returned a view")
    settings, cut = _settings(model.device), layers(model.model)
    settings["ignored_params"] = {p for p in model.parameters() if not p.ndim}  # a single number is whole on all
    _require_trainable(model, cut)
    for layer in cut:
        fsdp.fully_shard(layer, reshard_after_forward=ranks().parallel.reshard, **settings)
    # The output layer is used after the trunk's run too: what is in no layer stays gathered until a backward pass.
    fsdp.fully_shard(model, reshard_after_forward=False, **settings)
    for name in model.runs:
        fsdp.register_fsdp_forward_method(model, name)
    _sum_up(model)
    _gather_ahead(model, cut)


def _require_trainable(model: nn.Module, cut: Sequence[nn.Module]) -> None:
    """Raises SteersmanError where FSDP2 can not train the weights: single numbers, and those of several precisions in
    one group, which is a layer, or what is in no layer."""
    if any(p.requires_grad and not p.ndim for p in model.parameters()):
        raise SteersmanError(
            "parallel.mode fsdp: the model trains a parameter that is a single number, which has no pieces; use "
            "parallel.mode: replicas"
        )
    own = [list(layer.parameters()) for layer in cut]
    inside = {id(p) for weights in own for p in weights}
    for weights in (*own, [p for p in model.parameters() if id(p) not in inside]):
        found = sorted({str(p.dtype).removeprefix("torch.") for p in weights if p.requires_grad})
        if len(found) > 1:
            raise SteersmanError(
                f"parallel.mode fsdp: weights of {' and '.join(found)} would be trained side by side, and it takes "
                "one precision; use model.dtype: float32 (compute_dtype: bfloat16 computes in half of it), or "
                "parallel.mode: replicas"
            )


def _gather_ahead(model: Any, cut: Sequence[Any]) -> None:
    """Says which layer a backward pass gathers ahead of each: the one before it.

    Left to itself FSDP2 goes by the layers' last runs, and those of an engine count too, so a rank that had nothing
    to sample would gather other layers than the rest, which then wait for it in vain.
    """
    for part, before in zip((*cut, model), (cut[0], *cut), strict=True):
        part.set_modules_to_backward_prefetch([before])  # the first has itself, there already: none would be a guess


def place_head(head: nn.Linear) -> None:
    """The same for a layer that reads the states of a model which lies in pieces, in the layer's own precision."""
    if not ranks().sharded:
        return
    if ranks().parallel.stage:
        _cut[head] = LayerByLayer(head, [head])
        return
    from torch.distributed import fsdp

    settings = _settings(head.weight.device)
    settings["mp_policy"] = fsdp.MixedPrecisionPolicy(reduce_dtype=settings["mp_policy"].reduce_dtype)
    fsdp.fully_shard(head, reshard_after_forward=False, **settings)
    _sum_up(head)


def _settings(device: torch.device) -> dict[str, Any]:
    """Over which ranks weights are laid, and in which precision they are used and their gradients added up."""
    from torch.distributed import fsdp

    parallel = ranks().parallel
    own = {"same": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    return {
        "mesh": ranks().mesh(device.type),
        "mp_policy": fsdp.MixedPrecisionPolicy(own[parallel.compute_dtype], own[parallel.reduce_dtype]),
        "offload_policy": fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
        if parallel.offload
        else fsdp.OffloadPolicy(),
    }


def _sum_up(model: nn.Module) -> None:
    """Gradients are added up over the ranks, not averaged."""
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def layers(model: nn.Module) -> list[nn.Module]:
    """The blocks that transformers says must not be split, outermost first, none inside another."""
    names: set[str] = set(model._no_split_modules or ())  # type: ignore[arg-type]
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if type(module).__name__ in names and id(module) not in inside:
            found.append(module)
            inside |= {id(part) for part in module.modules()}
    if not found:
        raise SteersmanError(
            f"parallel.mode {ranks().parallel.mode}: {type(model).__name__} does not say which of its blocks are "
            "layers; use mode: replicas"
        )
    return found


def _parts(model: nn.Module) -> list[Any]:
    """The modules whose weights are gathered together; none where nothing is sharded."""
    return _sharded(model) if ranks().sharded else []


def _sharded(model: nn.Module) -> list[Any]:
    """The same, whatever this rank does by itself (`ranks.alone`)."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def as_local_shards(model: nn.Module) -> None:
    """Gives back what a run without gradients left gathered, so that the model's parameters are the pieces again."""
    for part in _parts(model):
        part.reshard()
    for part in _cut_parts(model):
        part.release()


_cut: WeakKeyDictionary[nn.Module, LayerByLayer] = WeakKeyDictionary()
"""Models that DeepSpeed has cut."""


def _cut_parts(model: nn.Module) -> list[LayerByLayer]:
    """The model and what is inside it, where DeepSpeed has cut it."""
    return [_cut[part] for part in model.modules() if part in _cut] if ranks().sharded else []


_together: WeakSet[nn.Module] = WeakSet()
"""Models whose weights are held whole now."""


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict while `whole_weights` is open, where PyTorch's own would give the pieces."""
    if not _sharded(model):
        return model.state_dict()
    named = model.named_parameters(remove_duplicate=False)
    state = {name: part.detach().clone() for name, part in named}  # whoever looks at the storage itself would pin it
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        state |= {f"{prefix}.{name}".lstrip("."): module.get_buffer(name) for name in kept}
    return state


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """While open every rank holds the whole weights, as sampling needs them; they must not change meanwhile.

    `model` is what `place` was given. A model that is not sharded has them anyway. An inner block on the same model
    changes nothing: the outermost one gives the weights back.
    """
    inside = model in _together
    parts, cut = ([], []) if inside else (_parts(model), _cut_parts(model))
    if not parts and not cut:
        yield
        return
    _together.add(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    for part in cut:
        part.keep()
    try:
        yield
    finally:
        _together.remove(model)
        for part in parts:
            part.set_reshard_after_forward(ranks().parallel.reshard and part is not model, recurse=False)
            part.reshard()
        for part in cut:
            part.release()


def weights_for_saving(model: nn.Module) -> AbstractContextManager[None]:
    """While open the model's weights can be read one by one to be written: FSDP2 gathers each when it is asked for,
    DeepSpeed's are all put together."""
    return whole_weights(model) if _cut_parts(model) else nullcontext()
