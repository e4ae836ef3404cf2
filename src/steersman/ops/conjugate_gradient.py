"""Solve A x = b for a symmetric positive-definite A that is known only by its products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, steps: int, tolerance: float = 1e-18
) -> Tensor:
    """x with A x = b after at most `steps` products, from x = 0; stops when |r|^2 <= tolerance * |b|^2.

    `product(v)` returns A v; all vectors are `[n]`. In exact arithmetic n steps solve it.
    Source: Hestenes and Stiefel 1952.
    """
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    square = residual @ residual
    floor = tolerance * square
    for _ in range(steps):
        if square <= floor:
            break
        image = product(direction)
        step = square / (direction @ image)
        x += step * direction
        residual -= step * image
        square_next = residual @ residual
        direction = residual + (square_next / square) * direction
        square = square_next
    return x
