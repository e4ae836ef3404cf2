"""Statistics over the steps that count.

Everything uses `torch.where` and not multiplication: NaN or Inf under a False mask must not leak.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def masked_sum(x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"], dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask` is True."""
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"], dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask` is True; 0 where nothing counts."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def beyond(mask: Bool[Tensor, "B T"], count: Int[Tensor, " B"]) -> Bool[Tensor, "B T"]:
    """The steps that count after each row's first `count` of them."""
    return mask & (mask.cumsum(-1) > count[:, None])


def last_step(mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Index of each row's last step that counts; -1 where none does."""
    steps = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, steps, -1).amax(-1)


def masked_var(x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"], unbiased: bool = False) -> Tensor:
    """Variance of `x` where `mask` is True, dividing by n, or by n - 1 when `unbiased`."""
    centred = x - masked_mean(x, mask)
    squares = masked_sum(centred**2, mask)
    return squares / (mask.sum() - int(unbiased)).clamp(min=1)


def whiten(
    x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"], shift_mean: bool = True, eps: float = 1e-8
) -> Float[Tensor, "*s"]:
    """(x - mean) / sqrt(var + eps) over the steps that count; 0 elsewhere.

    With `shift_mean=False` the mean is put back: only the scale changes. The variance divides by n. A constant
    input gives zeros, not NaN.
    """
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_var(x, mask) + eps)
    if not shift_mean:
        white = white + mean
    return torch.where(mask, white, torch.zeros_like(white))
