"""Masks that leave tokens out of the policy loss: `[B, T]`, without gradient."""

from __future__ import annotations

from math import ceil

from jaxtyping import Bool, Float
from torch import Tensor

from steersman.ops.masked import masked_mean

TIE = 1e-5
"""Nats: entropies no further apart are one, because rounding differs with the rows that are read together."""


def top_entropy(entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], share: float) -> Bool[Tensor, "B T"]:
    """H_t >= tau, tau the ceil(share n)-th largest entropy (nats) of the n steps that count; False under the mask.

    Steps that tie with tau are all True, so more than the share may be. Source: arXiv 2506.01939, eq. 6.
    """
    found = entropy[mask]
    if len(found) == 0:
        return mask
    least = found.topk(max(ceil(share * len(found)), 1)).values[-1]
    return mask & (entropy >= least - TIE)


def off_policy(
    logp: Float[Tensor, "B T"],
    logp_sampled: Float[Tensor, "B T"],
    adv: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    threshold: float,
) -> Bool[Tensor, "B T"]:
    """True where A_t < 0 and the response's mean of log pi_sampled - log pi is above `threshold` (nats per token).

    Source: DeepSeek-V3.2, arXiv 2512.02556, eq. 9.
    """
    away = masked_mean(logp_sampled - logp.detach(), mask, dim=-1)[:, None]
    return (adv < 0) & (away > threshold)
