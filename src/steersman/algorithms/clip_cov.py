"""Clip-Cov, arXiv 2505.22617: entropy is kept by leaving out the few steps that cost most of it."""

import torch
from pydantic import Field

from steersman.advantage.covariance import covariance, largest
from steersman.advantage.gae import Advantage
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class ClipCov(GroupRelative):
    """GRPO's advantage and clip; steps of large covariance of log pi and A teach nothing."""

    name = "clip-cov"
    title = "Clip-Cov"
    paper = "arXiv 2505.22617"
    bias = "scores are divided by their group's deviation, tokens by a random length; steps are left out"

    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")
    average: Average = Field(default="token", description=AVERAGED_BY)
    cov_share: float = Field(default=2e-4, ge=0, le=1, description="largest part of all steps that is left out")
    cov_low: float = Field(default=1.0, description="covariance above which a step may be left out")
    cov_high: float = Field(default=5.0, description="covariance below which a step may be left out")

    def advantage(self, traj: Trajectory) -> Advantage:
        adv = super().advantage(traj).adv
        found = covariance(traj.logp_old, adv, traj.mask)
        left_out = largest(found, traj.mask, self.cov_share, self.cov_low, self.cov_high)
        return Advantage(torch.where(left_out, 0.0, adv))
