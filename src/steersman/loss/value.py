"""Critic losses and how well a critic explains the returns."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steersman.ops.masked import masked_var


def value_loss(
    value: Float[Tensor, "B T"],
    value_old: Float[Tensor, "B T"],
    ret: Float[Tensor, "B T"],
    clip: float | None = None,
) -> Float[Tensor, "B T"]:
    """(V - R)^2 / 2, or with `clip` the larger of it and the same with V held within `clip` of `value_old`.

    Source: the clipped form is of the PPO code that came with arXiv 1707.06347, not of the paper.
    """
    plain = (value - ret).square()
    if clip is None:
        return plain / 2
    near = value_old + (value - value_old).clamp(-clip, clip)
    return torch.maximum(plain, (near - ret).square()) / 2


def explained_variance(
    value: Float[Tensor, "B T"], ret: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """1 - Var(R - V) / Var(R) over the steps that count; 0 where the returns do not vary.

    1 is a perfect critic, 0 one no better than a constant, below 0 one that does harm.
    """
    spread = masked_var(ret, mask)
    residual = masked_var(ret - value, mask)
    return torch.where(spread > 1e-12, 1 - residual / spread.clamp(min=1e-12), torch.zeros_like(spread))
