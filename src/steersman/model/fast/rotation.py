"""The rotation of queries and keys by their positions, compiled where a family turns them in the common way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from steersman.model.fast.plain import compiled_may_run
from steersman.model.fast.trial import numbers, same
from steersman.native.layers import rotate, rotates


class Rotation:
    """A family's rotation, with the compiled one in its place where that fits."""

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.original = original

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        fits = not more and not named and compiled_may_run(q, k, cos, sin)
        if not (fits and rotates(q, cos, sin) and rotates(k, cos, sin)):
            return self.original(q, k, cos, sin, *more, **named)
        return rotate(q, cos, sin), rotate(k, cos, sin)


def turns_alike(original: Callable[..., Any]) -> bool:
    """Whether a family's function does what the compiled rotation does."""
    q, k, cos, sin = numbers(2, 2, 5, 8), numbers(2, 1, 5, 8), numbers(1, 5, 8), numbers(1, 5, 8) + 0.5
    try:
        expected = original(q, k, cos, sin)
        return all(same(rotate(x, cos, sin), y) for x, y in zip((q, k), expected, strict=True))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # it turns in another way, or other things
