"""Frozen models whose weights wait in the CPU's memory and are on their device only while they are read.

What a frozen model weighs never changes, so the copy in memory stays true: to come costs a copy, to go costs nothing.
Weights that came from a file in half precision wait in that, in half the memory; they come as what they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

_waiting: WeakKeyDictionary[nn.Module, _Weights] = WeakKeyDictionary()
"""Models that `keep_away` was given."""
_staying: WeakSet[nn.Module] = WeakSet()
"""Models that it leaves alone."""


def let_stay(model: nn.Module) -> None:
    """Has `keep_away` leave a model where it is: its weights are another's too, so that nothing would be won."""
    _staying.add(model)


def keep_away(model: nn.Module) -> None:
    """Takes a frozen model's weights into the CPU's memory, from where `at_hand` brings them back to the device on
    which they are now, in the precision that they have now. While they wait the model can not be read. One that is to
    stay (`let_stay`) is left alone."""
    if model in _staying:
        return
    weights = _Weights(model)
    weights.put(weights.kept)
    _waiting[model] = weights


@contextmanager
def at_hand(model: nn.Module | None) -> Iterator[None]:
    """While open the model's weights are on its device. A model that nobody keeps away is there anyway, and None, a
    model without weights of its own, has none to bring. An inner block on the same model changes nothing."""
    weights = None if model is None else _waiting.get(model)
    if weights is None or weights.here:
        yield
        return
    weights.here = True
    try:
        weights.put({key: _frozen(x, weights.device, weights.dtypes[key]) for key, x in weights.kept.items()})
        yield
    finally:
        weights.put(weights.kept)
        weights.here = False


def bytes_to_come(model: nn.Module) -> int:
    """Bytes that a model which waits adds to its device while it is read."""
    weights = _waiting.get(model)
    if weights is None or weights.here:
        return 0
    return sum(
        x.numel() * weights.dtypes[key].itemsize
        for key, x in weights.kept.items()
        if x.device != weights.device or x.dtype != weights.dtypes[key]
    )


class _Weights:
    """A model's parameters and buffers: the places in its modules where they are named, with the number of what
    stands there (a tied weight stands in several places), and the copies in the CPU's memory by that number."""

    def __init__(self, model: nn.Module) -> None:
        found: list[tuple[dict[str, Any], str, Tensor]] = [
            (named, name, tensor)
            for module in model.modules()
            for named in (module._parameters, module._buffers)
            for name, tensor in named.items()
            if tensor is not None
        ]
        self.places = [(named, name, id(tensor)) for named, name, tensor in found]
        self.device = found[0][2].device
        self.dtypes = {id(tensor): tensor.dtype for _, _, tensor in found}
        self.kept = {id(tensor): _narrowed(_frozen(tensor, torch.device("cpu"))) for _, _, tensor in found}
        self.here = False

    def put(self, tensors: dict[int, Tensor]) -> None:
        """Names these tensors in the modules; what was named before is given back once nobody holds it."""
        for named, name, key in self.places:
            named[name] = tensors[key]


def _frozen(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on the device, a parameter where it was one."""
    moved = tensor.detach().to(device=device, dtype=dtype)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def _narrowed(tensor: Tensor) -> Tensor:
    """A parameter in half precision, where each of its numbers is one there."""
    if tensor.dtype is not torch.float32 or not isinstance(tensor, nn.Parameter):
        return tensor
    for half in (torch.bfloat16, torch.float16):
        narrow = _frozen(tensor, tensor.device, half)
        if torch.equal(narrow.float(), tensor):
            return narrow
    return tensor
