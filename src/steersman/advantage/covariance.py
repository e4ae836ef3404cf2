"""Which steps make a policy's entropy fall: those where the log-probability and the advantage are high together."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steersman.ops.masked import masked_mean


def covariance(
    logp: Float[Tensor, "B T"], adv: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """(log pi - mean log pi) (A - mean A) per step, means over the steps that count; 0 where the mask is False.

    Source: arXiv 2505.22617.
    """
    product = (logp - masked_mean(logp, mask)) * (adv - masked_mean(adv, mask))
    return torch.where(mask, product, torch.zeros_like(product))


def largest(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], share: float, low: float, high: float
) -> Bool[Tensor, "B T"]:
    """True for the largest entries between `low` and `high`, at most the part `share` of all that count.

    Source: arXiv 2505.22617.
    """
    candidate = mask & (x > low) & (x < high)
    count = min(int(share * int(mask.sum())), int(candidate.sum()))
    picked = torch.zeros_like(mask).flatten()
    ranked = torch.where(candidate, x, -torch.inf).flatten()
    picked[ranked.argsort(descending=True, stable=True)[:count]] = True
    return picked.reshape(mask.shape)
