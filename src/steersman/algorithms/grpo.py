"""GRPO, arXiv 2402.03300: a response's score standardised within its group, PPO's clip, KL in the loss."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.advantage.group import GroupScale, group_mean, spread
from steersman.advantage.returns import episode_return
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.loss.policy import clipped
from steersman.loss.reduce import Average
from steersman.ops.kl import KLEstimator
from steersman.types import Trajectory


class GRPO(Algorithm):
    """Group-relative advantage, no critic."""

    name = "grpo"
    title = "GRPO"
    paper = "arXiv 2402.03300"
    group = True
    bias = "scores are divided by their group's deviation, tokens by a random length; the KL term is k3"

    scale: GroupScale = Field("group", description="divide by the deviation of the group, the batch, or none")
    clip_low: float = Field(0.2, gt=0, lt=1, description="ratio is clipped below 1 minus this")
    clip_high: float = Field(0.2, gt=0, description="ratio is clipped above 1 plus this")
    kl_in: Literal["reward", "loss"] = Field(
        "loss", description="where the KL term goes: into every token's reward, or into the loss"
    )
    kl_estimator: KLEstimator = Field("k3", description="k1, k2 or k3; see steersman.ops.kl for their bias")
    average: Average = Field("sequence", description="how steps are averaged: token, sequence or episode")

    def advantage(self, traj: Trajectory) -> Advantage:
        group = torch.zeros(len(traj), dtype=torch.long) if traj.group is None else traj.group
        return Advantage(spread(group_mean(episode_return(traj), group, self.scale), traj.mask))

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return clipped(logp, traj.logp_old, adv, self.clip_low, self.clip_high)
