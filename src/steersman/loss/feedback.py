"""Losses over single answers that somebody liked or disliked: KTO, APO-zero and BCO.

`logp` and `ref_logp` are log-probabilities of whole answers (nats, `[B]`), `desirable` [B] is True for a thumbs
up. Every loss returns `(loss [B], explain)` with the implicit reward detached; the mean is the caller's.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

Explain = dict[str, Tensor]


def kto_reference_point(mismatched: Float[Tensor, " B"], ref_mismatched: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """KTO's reference point: a biased, cheap estimate of KL(pi || pi_ref) from answers to other prompts.

        z = max(0, mean_i [log pi(y_j | x_i) - log pi_ref(y_j | x_i)]),    j = i + 1 within the batch

    No gradient runs through it. With several devices, average the log-ratios over all of them before clamping:
    pass the gathered tensors.

    Source: arXiv 2402.01306, section 4, below eq. 8.
    """
    return (mismatched - ref_mismatched).mean().clamp(min=0).detach()


def auto_weights(likes: int, dislikes: int) -> tuple[float, float]:
    """lambda_D, lambda_U such that lambda_D n_D = lambda_U n_U, the commoner label's being 1.

    Source: arXiv 2402.01306, section 4.2 (a ratio between 1 and 3/2 is advised; this is 1).
    """
    most = max(likes, dislikes)
    return most / likes, most / dislikes


def kto(
    logp: Float[Tensor, " B"],
    ref_logp: Float[Tensor, " B"],
    desirable: Bool[Tensor, " B"],
    reference_point: Float[Tensor, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Tensor, " B"], Explain]:
    """Kahneman-Tversky optimisation: a saturating gain or loss relative to the reference point z.

        L = lambda_D (1 - sigma(beta (rho - z)))   for a desirable answer
        L = lambda_U (1 - sigma(beta (z - rho)))   for an undesirable one,   rho = log pi(y) - log pi_ref(y)

    The paper asks for lambda_D n_D / (lambda_U n_U) between 1 and 3/2 where the labels are unbalanced.

    Source: arXiv 2402.01306, eq. 8. Departure: lambda_y - v is written out, so a perfect fit costs 0.
    TRL 1.16 agrees, but for its mismatched answers: they are fixed once with the order of the data and may answer
    the very same prompt, while `objectives/feedback.py` takes the next answer in the batch to another one.
    """
    ratio = logp - ref_logp
    gain = beta * (ratio - reference_point)
    sign = torch.where(desirable, 1.0, -1.0).to(gain.dtype)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(gain.dtype)
    # 1 - sigma(x) = sigma(-x), without the cancellation
    return weight * torch.sigmoid(-sign * gain), {"reward": beta * ratio.detach()}


def apo_zero_unpaired(
    logp: Float[Tensor, " B"],
    ref_logp: Float[Tensor, " B"],
    desirable: Bool[Tensor, " B"],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Tensor, " B"], Explain]:
    """Anchored preference optimisation of single answers: KTO with the reference itself as its reference point.

        L = lambda_D (1 - sigma(beta rho))   for a desirable answer
        L = lambda_U sigma(beta rho)         for an undesirable one,   rho = log pi(y) - log pi_ref(y)

    For desirable answers that are better than the model's own. No answers to other prompts are read.

    Source: arXiv 2408.06266, eq. 7, whose two terms it takes apart, as TRL does; the weights are KTO's.
    """
    return kto(
        logp, ref_logp, desirable, logp.new_zeros(()), beta=beta, desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )  # fmt: skip


def bco(
    logp: Float[Tensor, " B"],
    ref_logp: Float[Tensor, " B"],
    desirable: Bool[Tensor, " B"],
    shift: Float[Tensor, ""],
    *,
    beta: float = 0.1,
) -> tuple[Float[Tensor, " B"], Explain]:
    """Binary classifier optimisation: the implicit reward is the logit of "liked".

        L = -log sigma(beta rho - delta)    for a desirable answer
        L = -log sigma(delta - beta rho)    for an undesirable one

    `shift` is delta = (E_D[beta rho] + E_U[beta rho]) / 2, half-way between the mean rewards of the two kinds over
    the data, without gradient; `objectives/feedback.py` keeps a moving average of each over the batches.

    Where liked and disliked answers belong to different prompts, the paper weights the disliked ones by
    p(liked | x) / p(disliked | x): multiply it onto what is returned.

    Source: arXiv 2404.04656. TRL 1.16 has the loss no more; its `bco_pair` is the sum over a pair at
    delta = 0.
    """
    reward = beta * (logp - ref_logp)
    sign = torch.where(desirable, 1.0, -1.0).to(reward.dtype)
    return -logsigmoid(sign * (reward - shift)), {"reward": reward.detach()}
