"""Weights for samples of another policy than the one that is trained: an older version, another engine or precision.

Write w_t = pi_old(a_t | s_t) / mu(a_t | s_t), pi_old what training says before the first update and mu what was
sampled from. Every correction multiplies the loss of a step by a detached number of its own response alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steersman.ops.masked import masked_mean, masked_sum

Kind = Literal[
    "none", "decoupled", "token_truncated", "token_masked", "sequence_truncated", "sequence_masked",
    "geometric_masked", "k3_masked",
]  # fmt: skip

CAPS: dict[Kind, float] = {
    "token_truncated": 2.0, "token_masked": 5.0, "sequence_truncated": 2.0, "sequence_masked": 2.0,
    "geometric_masked": 1.05, "k3_masked": 0.05,
}  # fmt: skip
"""What bounds each kind where nothing is said; `none` and `decoupled` have no bound."""


@dataclass(frozen=True, slots=True)
class Correction:
    """How steps of another policy's samples are weighed.

    - none: 1. Biased as far as the policies are apart.
    - decoupled: w_t, uncut; with a clip against pi_old it is AReaL's objective (arXiv 2505.24298, section 5.2).
    - token_truncated (TIS): min(w_t, cap) (Yao et al. 2025, "Your efficient RL framework secretly brings you
      off-policy RL training").
    - token_masked (IcePop): w_t where low <= w_t <= cap, else 0.
    - sequence_truncated: min(prod_t w_t, cap); with a cap that never binds the one unbiased correction.
    - sequence_masked (MIS): prod_t w_t where it is at most cap, else 0.
    - geometric_masked: w_t where low <= exp(mean_t log w_t) <= cap, else 0 for the whole response.
    - k3_masked: w_t where mean_t (w_t - 1 - log w_t) <= cap (nats per token), else 0 for the whole response.
    """

    kind: Kind = "token_truncated"
    cap: float = 2.0
    low: float = 0.5

    def weight(
        self, logp_old: Float[Tensor, "B T"], logp_rollout: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """The weight of each step; 1 where the mask is False, without gradient."""
        log_ratio = torch.where(mask, logp_old - logp_rollout, 0.0).detach()
        token, sequence = log_ratio.exp(), log_ratio.sum(-1, keepdim=True).exp().expand_as(log_ratio)
        mean = masked_mean(log_ratio, mask, dim=-1)[:, None].exp()
        k3 = masked_mean(token - 1 - log_ratio, mask, dim=-1)[:, None]
        made = {
            "none": torch.ones_like(token),
            "decoupled": token,
            "token_truncated": token.clamp(max=self.cap),
            "token_masked": _kept(token, (token >= self.low) & (token <= self.cap)),
            "sequence_truncated": sequence.clamp(max=self.cap),
            "sequence_masked": _kept(sequence, sequence <= self.cap),
            "geometric_masked": _kept(token, (mean >= self.low) & (mean <= self.cap)),
            "k3_masked": _kept(token, k3 <= self.cap),
        }[self.kind]
        return torch.where(mask, made, 1.0)

    def bound(
        self, logp_old: Float[Tensor, "B T"], logp_rollout: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """Share of the steps that count whose weight is not what it would be without a bound."""
        free: Kind = "sequence_truncated" if self.kind.startswith("sequence") else "decoupled"
        if self.kind == "none":
            free = "none"
        uncut = Correction(free, torch.inf).weight(logp_old, logp_rollout, mask)
        changed = self.weight(logp_old, logp_rollout, mask) != uncut
        return masked_mean(changed.to(logp_old.dtype), mask)


def effective_sample_size(weight: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """(sum w)^2 / (n sum w^2) over the steps that count: 1 where all weigh alike, 0 where all weights are 0."""
    squares = masked_sum(weight.square(), mask)
    return masked_sum(weight, mask).square() / (mask.sum() * squares).clamp(min=torch.finfo(weight.dtype).tiny)


def _kept(weight: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, weight, 0.0)
