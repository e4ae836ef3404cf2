"""An attention layer's forward as transformers wrote it, in which two names stand for ours.

A family's file is read by every model of that family in the process, and transformers' registries by every model, so
nothing is put into either. The function is made a second time, over a copy of its file's names in which the rotation
and the table of attentions are ours; only modules of models that were given it (`fused.quicken`) call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import CellType, FunctionType
from typing import Any

from steersman.model.fast.attention import attention
from steersman.model.fast.rotation import Rotation, turns_alike

ROTATION, ATTENTIONS = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"


@cache
def own_forward(kind: type) -> Callable[..., Any] | None:
    """The class's forward over names of ours; None where it looks up neither, or is not a plain function.

    What someone puts into the family's file afterwards is not seen by it.
    """
    return over_names(kind.forward, STAND_INS)  # type: ignore[attr-defined]


def over_names(function: Any, stand_ins: Mapping[str, Callable[[Any], Any]]) -> FunctionType | None:
    """The function over a copy of its file's names in which some stand for ours: what `stand_ins` make of what the
    file has, None leaving that. A decorator is taken along. None where the function looks up none of them."""
    if type(function) is not FunctionType:
        return None
    code, names = function.__code__, function.__globals__
    ours = {name: stand_in(names[name]) for name, stand_in in stand_ins.items()
            if name in code.co_names and name in names}  # fmt: skip
    ours = {name: thing for name, thing in ours.items() if thing is not None}
    if ours:
        return _copy(function, {**names, **ours}, function.__closure__)
    inner = vars(function).get("__wrapped__")  # a decorator's, as where an argument has got another name
    own = None if inner is None else over_names(inner, stand_ins)
    if own is None:
        return None
    closure = function.__closure__ or ()
    if not any(_holds(cell, inner) for cell in closure):
        return None
    outer = _copy(function, names, tuple(CellType(own) if _holds(cell, inner) else cell for cell in closure))
    outer.__wrapped__ = own  # type: ignore[attr-defined]
    return outer


def _holds(cell: CellType, thing: Any) -> bool:
    try:
        return cell.cell_contents is thing
    except ValueError:  # not filled yet
        return False


def _copy(function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    own = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def call_own_forward(module: Any, *args: Any, **named: Any) -> Any:
    """The module's forward over names of ours; only for modules whose class has one."""
    forward = own_forward(type(module))
    assert forward is not None
    return forward(module, *args, **named)


def _rotation(original: Any) -> Rotation | None:
    return Rotation(original) if turns_alike(original) else None


def _attentions(known: Any) -> Any | None:
    """A table of attentions like the file's, in which "sdpa" is ours; None where that is not transformers' own."""
    # a module that looks these up has imported them
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if type(known) is not AttentionInterface or known.get("sdpa") is not sdpa_attention_forward:
        return None
    ours = AttentionInterface()  # what is put into an instance stays in it
    for name, function in known.items():
        if ours.get(name) is not function:
            ours[name] = function
    ours["sdpa"] = attention
    return ours


STAND_INS: dict[str, Callable[[Any], Any]] = {ROTATION: _rotation, ATTENTIONS: _attentions}
"""The names that are ours in a forward, and what makes ours of what the file has; None leaves the file's."""
