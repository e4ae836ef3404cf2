"""A model's norms, gates, rotations and attention done by the compiled loops of `native`, where these do the same.

What a family calls its norm may be anything, so each kind of module is asked once: it is given random numbers, and
only if the compiled loop gives what the module gives does it stand in for it. All else stays as it is, and so does
everything on an accelerator, in another dtype, or while `plain_layers` is open.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steersman.model.fast.attention import registered
from steersman.model.fast.linear import quicken_linear
from steersman.model.fast.plain import plain
from steersman.native import library
from steersman.native.layers import GATES, gated, gates, norms, rms_norm, rotate, rotates

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
PLAIN = (Tensor, nn.Parameter)
ROTATION = "apply_rotary_pos_emb"


def quicken(model: Any) -> None:
    """Lets the model's modules use the compiled loops, where there are any; doing it again changes nothing."""
    quicken_linear(model)
    if library() is None:
        return
    found: dict[Any, Any] = {}
    for module in model.modules():
        kind = type(module)
        asked = kind in found
        if _norm_like(module):
            offset = found[kind] = found[kind] if asked else _offset(module)
            if offset is not None:
                module.forward = partial(_norm, module, offset, _eps(module))
        elif _gate_like(module):
            kind = kind, repr(module.act_fn)  # layers of one class may differ in it
            asked = kind in found
            gate = found[kind] = found[kind] if asked else _gate(module)
            if gate is not None:
                module.forward = partial(_feed_forward, module, gate)
    for code in {type(module).__module__ for module in model.modules()}:
        _quicken_rotation(sys.modules.get(code))
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) == "sdpa" and model.device.type == "cpu":
        model.set_attn_implementation(registered())


def _fits(*tensors: Tensor) -> bool:
    """Whether the compiled loops may run here and now; parameters that are sharded or traced are left alone."""
    return all(type(x) in PLAIN for x in tensors) and not plain()


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
    x, eps = _numbers(3, len(weight)), _eps(module)
    with torch.no_grad():
        expected = torch.func.functional_call(module, {"weight": weight}, (x,))
    return next((o for o in (0.0, 1.0) if _same(rms_norm(x, weight, eps, o), expected)), None)


def _norm(module: Any, offset: float, eps: float, x: Tensor) -> Tensor:
    if not (_fits(x, module.weight) and norms(x, module.weight)):
        return type(module).forward(module, x)
    return rms_norm(x, module.weight, eps, offset)


def _gate_like(module: Any) -> bool:
    return all(isinstance(getattr(module, part, None), nn.Module) for part in PARTS) and all(
        isinstance(getattr(module, part), nn.Linear) for part in PARTS[:3]
    )


def _gate(module: Any) -> str | None:
    """Which gate the feed-forward layer has; None where it is another, or does more than multiply by it."""
    x = _numbers(4, 64) * 3
    linear = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        kind = next((k for k in GATES if _same(module.act_fn(x), gated(x, torch.ones_like(x), k))), None)
        if kind is None:
            return None
        stand_in = nn.Module()
        stand_in.gate_proj, stand_in.up_proj, stand_in.down_proj = linear, nn.Linear(64, 64), nn.Linear(64, 64)
        stand_in.act_fn = module.act_fn
        try:
            expected = type(module).forward(stand_in, x)
        except (AttributeError, TypeError, RuntimeError):
            return None  # it needs more than its four parts
        return kind if _same(_feed_forward(stand_in, kind, x), expected) else None


def _feed_forward(module: Any, kind: str, x: Tensor) -> Tensor:
    if not _fits(x):
        return type(module).forward(module, x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    opened = gated(gate, up, kind) if _fits(gate, up) and gates(gate, up) else module.act_fn(gate) * up
    return module.down_proj(opened)


def _quicken_rotation(code: Any) -> None:
    """Puts the compiled rotation into a family's file, where it does what that family's function does."""
    original: Any = getattr(code, ROTATION, None)
    if original is None or isinstance(original, _Rotation):
        return
    q, k, cos, sin = _numbers(2, 2, 5, 8), _numbers(2, 1, 5, 8), _numbers(1, 5, 8), _numbers(1, 5, 8) + 0.5
    try:
        expected = original(q, k, cos, sin)
        same = all(_same(rotate(x, cos, sin), y) for x, y in zip((q, k), expected, strict=True))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return  # it turns in another way, or other things
    if same:
        setattr(code, ROTATION, _Rotation(original))


class _Rotation:
    """A family's rotation of queries and keys, with the compiled one in its place where that fits."""

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.original = original

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        fits = not more and not named and _fits(q, k, cos, sin) and rotates(q, cos, sin) and rotates(k, cos, sin)
        if not fits:
            return self.original(q, k, cos, sin, *more, **named)
        return rotate(q, cos, sin), rotate(k, cos, sin)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _same(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())
