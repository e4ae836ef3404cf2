"""Linear layers whose large products take the faster of torch's libraries, and keep less for the backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from steersman.model.fast.plain import plain
from steersman.native import library
from steersman.ops.products import available, linear


class FastLinear(nn.Linear):
    """torch's layer with `ops.products.linear` for its product; torch's own while `plain_layers` is open."""

    def forward(self, input: Tensor) -> Tensor:
        if plain():
            return functional.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


LINEAR = (nn.Linear, FastLinear)
"""The layers that are x weight^T + bias and nothing else; quantised and adapted ones are classes of their own."""


def quicken_linear(model: Any) -> list[nn.Linear]:
    """Makes the model's plain linear layers fast ones, where that is of use on this machine; returns those."""
    of_use = available() or library() is not None
    layers = [module for module in model.modules() if type(module) is nn.Linear] if of_use else []
    for layer in layers:
        layer.__class__ = FastLinear
    return layers


def slow_linear(layers: list[nn.Linear]) -> None:
    """Makes fast layers torch's own again."""
    for layer in layers:
        layer.__class__ = nn.Linear
