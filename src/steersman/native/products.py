"""Products of a few dozen rows with weights laid out beforehand; float32 on a CPU.

A library's product of 64 rows spends a fifth of its time on rearranging the weights and waits for them to arrive from
memory; here they lie in panels that are read from end to end, the next one fetched while one is worked on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steersman.native import loaded


@dataclass(frozen=True, slots=True)
class Panels:
    """Weights [outputs, inputs] as `product` reads them: a copy, of as many bytes."""

    data: Tensor
    outputs: int
    inputs: int


def rearrange(weights: Sequence[Float[Tensor, "O I"]]) -> list[Panels]:
    """The panels of some matrices: each [ceil(O / P), I, P] with P the processor's panel width, zeros beyond O."""
    lib, shapes = loaded(), _shapes(weights)
    # one piece, for which numpy asks the system for huge pages: small ones would cost as much as the copying
    memory = torch.from_numpy(np.empty(sum(map(math.prod, shapes)), dtype=np.float32))
    panels = []
    for weight, shape in zip(weights, shapes, strict=True):
        data, memory = memory[: math.prod(shape)].view(shape), memory[math.prod(shape) :]
        weight = weight.detach().contiguous()
        lib.rearrange(weight.data_ptr(), data.data_ptr(), *weight.shape, torch.get_num_threads())
        panels.append(Panels(data, *weight.shape))
    return panels


def panel_bytes(weights: Sequence[Float[Tensor, "O I"]]) -> int:
    """Bytes of what `rearrange` makes of these matrices."""
    return sum(4 * math.prod(shape) for shape in _shapes(weights)) if weights else 0


def _shapes(weights: Sequence[Float[Tensor, "O I"]]) -> list[tuple[int, int, int]]:
    width = loaded().panel_width()
    return [(-(-weight.shape[0] // width), weight.shape[1], width) for weight in weights]


def product(x: Float[Tensor, "*lead I"], weight: Panels, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, [*lead, O]. A row's numbers do not depend on the rows beside it, to the last bit."""
    lib = loaded()
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.outputs)
    lib.product(
        x.data_ptr(), weight.data.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
        x.numel() // weight.inputs, weight.inputs, weight.outputs, torch.get_num_threads(),
    )  # fmt: skip
    return out
