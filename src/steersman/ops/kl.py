"""Estimators of KL(pi || ref) from samples of pi.

With d = log pi(a) - log ref(a) at a sampled token, the three of J. Schulman's note "Approximating KL Divergence"
(2020), each non-negative in expectation:

| name | value | as a number | as a loss (gradient through log pi) |
| --- | --- | --- | --- |
| k1 | d | unbiased, high variance, negative for single samples | expectation 0: no use as a loss |
| k2 | d^2 / 2 | biased, small where the policies are close | unbiased gradient of KL(pi || ref) |
| k3 | exp(-d) - 1 + d | unbiased, low variance, never negative | gradient of KL(ref || pi), not of KL(pi || ref) |

So: k1 inside the reward (its score-function gradient is the exact one), k2 inside a loss, k3 for reading, or in a
loss where a paper says so (GRPO, arXiv 2402.03300, eq. 4).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logp: Float[Tensor, "*s"], logp_ref: Float[Tensor, "*s"], estimator: KLEstimator = "k1"
) -> Float[Tensor, "*s"]:
    """Per-token estimate of KL(pi || ref) in nats, from tokens sampled by pi."""
    d = logp - logp_ref
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    return torch.expm1(-d) + d
