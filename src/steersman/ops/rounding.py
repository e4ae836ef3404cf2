"""Rounding to fewer bits that loses nothing on average."""

from __future__ import annotations

import torch
from torch import Tensor

CUT = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32's fraction that the type has no room for."""


def stochastic(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 numbers, rounded to those of bfloat16 or float16, up or down at random so that the mean is x; float32.

    What the type holds exactly stays as it is. Departure: float16's numbers below 6e-5, which lie closer together
    than the bits that are cut say, are left to the nearest when the result is converted.
    """
    cut, x = CUT[dtype], x.contiguous()
    noise = torch.randint(0, 1 << cut, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    drawn = (
        noise.add_(x.view(torch.int32)).bitwise_and_(-(1 << cut)).view(torch.float32)
    )  # in place: models are large
    return torch.where(x.isfinite(), drawn, x)
