"""Bytes of the tensors that are made while a piece of code runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PLAIN = (Tensor, nn.Parameter)


class NewStorageBytes(TorchDispatchMode):
    """While open, adds up the bytes of every new storage in `total`; a view has its tensor's, and counts once.

    Pieces of sharded tensors are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if type(x) in PLAIN}
        for x in tree_leaves(out):
            if type(x) in PLAIN and x.untyped_storage()._cdata not in given:
                self._note(x)
        return out

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self._alive:
            self._alive.add(storage._cdata)
            self.total += storage.nbytes()
            weakref.finalize(storage, self._alive.discard, storage._cdata)
