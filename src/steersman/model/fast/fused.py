"""A model's norms, gates, rotations and attention done by the compiled loops of `native`, where these do the same.

What a family calls its norm may be anything, so each kind of module is asked once: it is given random numbers, and
only if the compiled loop gives what the module gives does it stand in for it. All else stays as it is, and so does
everything on an accelerator, in another dtype, or while `plain_layers` is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steersman.model.fast.linear import quicken_linear, slow_linear
from steersman.model.fast.own_forward import call_own_forward, own_forward
from steersman.model.fast.plain import compiled_may_run
from steersman.model.fast.trial import numbers, same
from steersman.model.module_forward import ModuleForward
from steersman.native import library
from steersman.native.layers import GATES, gated, gates, norms, rms_norm

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def quicken(model: Any) -> list[nn.Module]:
    """Lets the model's modules use the compiled loops, where there are any, for as long as the model lives.

    Only these instances are touched: linear layers become fast ones, and others get a `forward` of their own, unless
    they have one already; the latter are returned. Nothing of transformers is changed, and other models of the family
    know nothing of it.
    """
    quicken_linear(model)
    if library() is None:
        return []
    asked: dict[Any, Any] = {}
    quickened = []
    for module in model.modules():
        forward = None if "forward" in vars(module) else _quick_forward(module, asked)
        if forward is not None:
            module.forward = forward
            quickened.append(module)
    return quickened


@contextmanager
def quick(model: Any) -> Iterator[None]:
    """`quicken` while open; what was not so before is put back."""
    linears = quicken_linear(model)
    quickened = quicken(model)
    try:
        yield
    finally:
        slow_linear(linears)
        for module in quickened:
            vars(module).pop("forward", None)


def _quick_forward(module: Any, asked: dict[Any, Any]) -> Callable[..., Any] | None:
    """What stands in for the module's forward; `asked` remembers what kinds of modules were found to do."""
    kind = type(module)
    if _norm_like(module):
        if kind not in asked:
            asked[kind] = _offset(module)
        return None if asked[kind] is None else ModuleForward(_norm, module, asked[kind], _eps(module))
    if _gate_like(module):
        kind = kind, repr(module.act_fn)  # layers of one class may differ in it
        if kind not in asked:
            asked[kind] = _gate(module)
        return None if asked[kind] is None else ModuleForward(_feed_forward, module, asked[kind])
    return None if own_forward(kind) is None else ModuleForward(call_own_forward, module)


def _norm_like(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        "Norm" in type(module).__name__
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and getattr(module, "bias", None) is None
        and isinstance(_eps(module), float)
    )


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _offset(module: Any) -> float | None:
    """0 where the norm multiplies by its weight, 1 where by 1 + weight, None where it does something else."""
    weight = torch.linspace(0.5, 2.0, module.weight.shape[0])
    x, eps = numbers(3, len(weight)), _eps(module)
    try:
        with torch.no_grad():
            expected = torch.func.functional_call(module, {"weight": weight}, (x,))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None  # it needs more than what is to be normalised
    return next((o for o in (0.0, 1.0) if same(rms_norm(x, weight, eps, o), expected)), None)


def _norm(module: Any, offset: float, eps: float, x: Tensor, *more: Any, **named: Any) -> Tensor:
    """What the module gives; some (Mamba2's) may be given a gate too, and do it themselves then."""
    if more or named or not (compiled_may_run(x, module.weight) and norms(x, module.weight)):
        return type(module).forward(module, x, *more, **named)
    return rms_norm(x, module.weight, eps, offset)


def _gate_like(module: Any) -> bool:
    """Whether it has the parts of a gated layer; these may be linear, quantised, or have adapters."""
    return all(isinstance(getattr(module, part, None), nn.Module) for part in PARTS)


def _gate(module: Any) -> str | None:
    """Which gate the feed-forward layer has; None where it is another, or does more than multiply by it."""
    x = numbers(4, 64) * 3
    linear = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        kind = next((k for k in GATES if same(module.act_fn(x), gated(x, torch.ones_like(x), k))), None)
        if kind is None:
            return None
        stand_in = nn.Module()
        stand_in.gate_proj, stand_in.up_proj, stand_in.down_proj = linear, nn.Linear(64, 64), nn.Linear(64, 64)
        stand_in.act_fn = module.act_fn
        try:
            expected = type(module).forward(stand_in, x)
        except (AttributeError, TypeError, RuntimeError):
            return None  # it needs more than its four parts
        return kind if same(_feed_forward(stand_in, kind, x), expected) else None


def _feed_forward(module: Any, kind: str, x: Tensor) -> Tensor:
    if not compiled_may_run(x):
        return type(module).forward(module, x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    opened = gated(gate, up, kind) if compiled_may_run(gate, up) and gates(gate, up) else module.act_fn(gate) * up
    return module.down_proj(opened)
