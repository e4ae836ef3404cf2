"""Estimators of KL(pi || ref) from samples of pi.

With d = log pi(a) - log ref(a) at a sampled token, the three of J. Schulman's note "Approximating KL Divergence"
(2020), each non-negative in expectation:

| name | value | as a number | as a loss (gradient through log pi) |
| --- | --- | --- | --- |
| k1 | d | unbiased, high variance, negative for single samples | expectation 0: no use as a loss |
| k2 | d^2 / 2 | biased, small where the policies are close | per state, that of KL(pi(.|s) || ref(.|s)) |
| k3 | exp(-d) - 1 + d | unbiased, low variance, never negative | per state, that of KL(ref(.|s) || pi(.|s)) |

"Per state" is not the whole gradient of a response's KL. A token also decides which states come after it, and

    grad KL(pi || ref) = E[ sum_t grad log pi(a_t | s_t) * sum_{s >= t} d_s ],

while k2 in a loss has d_t in the place of the inner sum. For answers of one token that is the same; in a random
language of three steps it is off by a third of the gradient's length (tests/ops, by enumeration). The exact forms are
k1 in the reward, whose return is that inner sum, and `k1_to_go` in the loss, which is the equation above. k3 is for
reading, or in a loss where a paper says so (GRPO, arXiv 2402.03300, eq. 4).

Where sampling is truncated, pi allows the tokens A of a state and ref, which stays whole, gives them the mass m < 1.
k1 is unbiased as before. k3's expectation is KL(pi || ref) - (1 - m), too small by the mass cut off; in a loss
its gradient is that of m KL(ref(. | A) || pi), so it pulls toward the reference renormalised on what is allowed, and
less the more was cut.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "k1_to_go"]
"""What a recipe may choose; `k1_to_go` is for a loss alone (`kl_loss`)."""


def kl_estimate(
    logp: Float[Tensor, "*s"], logp_ref: Float[Tensor, "*s"], estimator: KLEstimator = "k1"
) -> Float[Tensor, "*s"]:
    """Per-token estimate of KL(pi || ref) in nats, from tokens sampled by pi; as a number, `k1_to_go` is k1."""
    d = logp - logp_ref
    if estimator in ("k1", "k1_to_go"):
        return d
    if estimator == "k2":
        return d.square() / 2
    return torch.expm1(-d) + d


def kl_loss(
    logp: Float[Tensor, "B T"], logp_ref: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], estimator: KLEstimator
) -> Float[Tensor, "B T"]:
    """The per-token KL term of a loss, nats; 0 where the mask is False. `logp` carries the gradient.

    k2 and k3 are their values. `k1_to_go` is log pi(a_t) * stop(sum_{s >= t} d_s), whose gradient, summed over the
    steps of responses sampled by pi, is in expectation that of KL(pi || ref) over responses; its value means nothing.
    """
    if estimator != "k1_to_go":
        return torch.where(mask, kl_estimate(logp, logp_ref, estimator), 0.0)
    d = torch.where(mask, (logp - logp_ref).detach(), 0.0)
    to_go = d.flip(-1).cumsum(-1).flip(-1)
    return torch.where(mask, logp * to_go, 0.0)
