"""From `[batch, time]` to one number, with the denominator in the open.

A loss is reduced as sum(weight * loss) / denominator. A row's weights depend on that row alone and the
denominator is counted once over the whole optimisation batch, so splitting the batch into micro-batches,
accumulating gradients or sharding rows over devices can not change the result: partial sums simply add.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Average = Literal["token", "sequence", "constant"]
"""How tokens are averaged.

- "token": every token of the batch weighs the same (PPO; DAPO, arXiv 2503.14476, eq. 8).
- "sequence": mean within each sequence, then over sequences (GRPO, arXiv 2402.03300, eq. 3).
- "constant": sum within each sequence divided by one fixed length, then the mean over sequences
  (Dr.GRPO, arXiv 2503.20783), so that long answers are not weighted down.
"""


def token_weight(
    mask: Bool[Tensor, "B T"], average: Average, constant: float = 1.0
) -> Float[Tensor, "B T"]:
    """Weight of each step, a function of its own row only. `constant` is the fixed length of "constant"."""
    weight = mask.float()
    if average == "sequence":
        return weight / weight.sum(-1, keepdim=True).clamp(min=1)
    if average == "constant":
        return weight / constant
    return weight


def denominator(mask: Bool[Tensor, "B T"], average: Average) -> Float[Tensor, ""]:
    """What the weighted sum over the whole optimisation batch is divided by: tokens, or sequences."""
    count = mask.sum() if average == "token" else mask.any(-1).sum()
    return count.clamp(min=1).float()


def reduce(
    loss: Float[Tensor, "B T"], weight: Float[Tensor, "B T"], denominator: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """sum(weight * loss) / denominator. Steps of weight 0 contribute nothing, not even NaN."""
    kept = torch.where(weight != 0, loss, torch.zeros_like(loss))
    return (weight * kept).sum() / denominator
