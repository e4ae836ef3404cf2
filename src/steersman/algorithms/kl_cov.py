"""KL-Cov, arXiv 2505.22617: entropy is kept by holding the steps that cost most of it to the sampler."""

import torch
from pydantic import Field
from torch import Tensor

from steersman.advantage.covariance import covariance, largest
from steersman.advantage.gae import Advantage
from steersman.algorithms.base import Coefficients
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.policy import surrogate
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class KLCov(GroupRelative):
    """GRPO's advantage, no clip; a penalty on the steps of largest covariance of log pi and A."""

    name = "kl-cov"
    title = "KL-Cov"
    paper = "arXiv 2505.22617"
    unread = ("clip_low", "clip_high")

    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")
    average: Average = Field(default="token", description=AVERAGED_BY)
    cov_share: float = Field(
        default=2e-3,
        ge=0,
        le=1,
        description="share of all tokens, those of highest covariance of log pi and advantage, that get the penalty",
    )
    cov_coef: float = Field(default=1.0, ge=0, description="weight of the penalty |log pi - log pi_old|")

    def clip_range(self) -> None:
        return None

    def advantage(self, traj: Trajectory) -> Advantage:
        adv = super().advantage(traj).adv
        found = covariance(traj.logp_old, adv, traj.mask)
        traj.penalty_mask = largest(found, traj.mask, self.cov_share, -torch.inf, torch.inf)
        return Advantage(adv)

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        loss = surrogate(logp, traj.logp_old, adv)
        penalty = (
            torch.zeros_like(loss)
            if traj.penalty_mask is None
            else torch.where(traj.penalty_mask, (logp - traj.logp_old).abs(), 0.0)
        )
        return loss + self.cov_coef * penalty
