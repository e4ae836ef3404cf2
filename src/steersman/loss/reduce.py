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

Average = Literal["token", "sequence", "episode"]
"""How steps are averaged.

- "token": every step of the batch weighs the same (PPO; DAPO, arXiv 2503.14476, eq. 12).
- "sequence": mean within each sequence, then over sequences (GRPO, arXiv 2402.03300, eq. 3).
- "episode": sum within each sequence, divided by one fixed number that is the same for all (Dr.GRPO, arXiv
  2503.20783), then the mean over sequences. Only this one leaves the gradient of an expected return unbiased:
  the other two divide by a random length.

A sequence is a row: a response, or an episode of all its turns.
"""
AVERAGED_BY = (
    "how the loss averages steps (tokens). token: all of the batch alike; sequence: mean of each response, then over "
    "responses; episode: sum of each response over one fixed number, then the mean (the only one without bias)"
)
"""The choice as recipes describe it."""


def token_weight(
    mask: Bool[Tensor, "B T"], average: Average, constant: float = 1.0, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "B T"]:
    """Weight of each step, a function of its own row only. `constant` is the fixed number of "episode"."""
    weight = mask.to(dtype)
    if average == "sequence":
        return weight / weight.sum(-1, keepdim=True).clamp(min=1)
    if average == "episode":
        return weight / constant
    return weight


def denominator(mask: Bool[Tensor, "B T"], average: Average) -> int:
    """What the weighted sum over the whole optimisation batch is divided by: `counted`, at least 1."""
    return max(counted(mask, average), 1)


def counted(mask: Bool[Tensor, "B T"], average: Average) -> int:
    """Steps, or sequences; those of parts of a batch add up to the whole's.

    A sequence with no step that counts (an empty response) is still a sequence of "episode": its return was
    sampled. For "sequence" it is not, having no mean.
    """
    if average == "token":
        return int(mask.sum())
    return int(mask.any(-1).sum()) if average == "sequence" else len(mask)


def reduce(loss: Float[Tensor, "B T"], weight: Float[Tensor, "B T"], denominator: int | float) -> Float[Tensor, ""]:
    """sum(weight * loss) / denominator. Steps of weight 0 contribute nothing, not even NaN."""
    kept = torch.where(weight != 0, loss, torch.zeros_like(loss))
    return (weight * kept).sum() / denominator
