"""NLPO, arXiv 2210.01241: PPO whose actions are limited to the top-p set of a lagging copy of the policy.

The limit acts while sampling and in the loss: log-probabilities are those of the masked distribution on both
sides, so the ratio is 1 before the first update. End tokens are always allowed, so that every response can end.
The reference is not masked: KL to it counts what the mask cuts away. The masking copy is refreshed every
`mask_every` iterations.
"""

from pydantic import Field

from steersman.algorithms.base import SamplingMask
from steersman.algorithms.ppo import PPO


class NLPO(PPO):
    """PPO on the masked policy."""

    name = "nlpo"
    title = "NLPO"
    paper = "arXiv 2210.01241"
    bias = PPO.bias + "; tokens outside the mask get no gradient"
    fixed_point = "the optimum among the answers that the mask allows"

    masks = True

    mask_top_p: float = Field(default=0.9, gt=0, le=1, description="mass of the masking policy's allowed set")
    mask_min_tokens: int = Field(default=2, ge=1, description="fewest tokens that stay allowed")
    mask_every: int = Field(default=20, ge=1, description="iterations between refreshes of the masking policy (mu)")

    def sampling_mask(self) -> SamplingMask:
        return SamplingMask(self.mask_top_p, self.mask_min_tokens, self.mask_every)
