"""A switch for the library's own layers and attention in place of the compiled ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_plain: ContextVar[bool] = ContextVar("plain layers", default=False)


@contextmanager
def plain_layers() -> Iterator[None]:
    """The library's own layers while open: for second derivatives, which the compiled loops do not have."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def plain() -> bool:
    """Whether the compiled loops stand aside: `plain_layers` is open, or the model is being traced."""
    return _plain.get() or torch.compiler.is_compiling()


def compiled_may_run(*tensors: Tensor) -> bool:
    """Whether the compiled loops may run here and now; parameters that are sharded or traced are left alone."""
    return all(type(x) in (Tensor, nn.Parameter) for x in tensors) and not plain()
