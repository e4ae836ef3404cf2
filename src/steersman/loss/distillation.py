"""What distillation adds at each step of a student's own answers, where more than the step itself counts."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def still_to_come(
    gap: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, normalised: bool = True
) -> Float[Tensor, "B T"]:
    """What a token leads to: sum_{s > t} log p(y_s) - log q(y_s), p the teacher's probability and q the student's.

        R_{t+1} = sum_{s > t} gap_s        (normalised: divided by the number of those steps)

    As the weight of grad log q(y_t), beside the step's own KL(q || p), it makes the gradient of the KL of whole
    answers: grad KL(q(.|x) || p(.|x)) = E[ sum_t grad KL_t - R_{t+1} grad log q(y_t) ]. Dividing by the length keeps
    short answers from being preferred, and is no longer that gradient. Nothing here carries a gradient.

    Source: arXiv 2306.08543, eq. 4 (the step alone and what is to come, taken apart) and 6 (normalised).
    """
    gap = torch.where(mask, gap, 0.0).detach()
    after = gap.flip(-1).cumsum(-1).flip(-1) - gap
    if normalised:
        count = mask.to(gap.dtype)
        left = count.flip(-1).cumsum(-1).flip(-1) - count
        after = after / left.clamp(min=1)
    return torch.where(mask, after, 0.0)


def distillation(
    divergence: Float[Tensor, "B T"],
    logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    weight: Float[Tensor, "B T"] | None = None,
    nll: float = 0.0,
) -> Float[Tensor, "B T"]:
    """D_t - weight_t log q(y_t) - nll log q(y_t): the divergence, a policy gradient, and likelihood of the answer.

    `weight` is what a token was worth (`still_to_come`, and the reward's advantage): arXiv 2306.13649, eq. 5, adds
    a reward so, its (1 - alpha) r against alpha D. It carries no gradient.
    """
    pull = nll if weight is None else weight.detach() + nll
    return torch.where(mask, divergence - pull * logp, 0.0)
