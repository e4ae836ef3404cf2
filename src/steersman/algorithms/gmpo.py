"""GMPO, arXiv 2507.20673: the geometric mean of a response's ratios, each token's clipped on its own."""

from math import exp

from pydantic import Field
from torch import Tensor

from steersman.algorithms.base import Coefficients
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.policy import geometric_clipped
from steersman.types import Trajectory


class GMPO(GroupRelative):
    """GRPO's advantage; the geometric mean damps the few tokens whose ratio is extreme."""

    name = "gmpo"
    title = "GMPO"
    whole_episode = "has one ratio for a whole episode"
    paper = "arXiv 2507.20673"
    unread = ("top_entropy",)

    clip_low: float = Field(default=0.4, gt=0, description="a token's log ratio is clipped below minus this, nats")
    clip_high: float = Field(default=0.4, gt=0, description="a token's log ratio is clipped above this, nats")
    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")

    def clip_range(self) -> tuple[float, float]:
        return 1 - exp(-self.clip_low), exp(self.clip_high) - 1

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return geometric_clipped(logp, traj.logp_old, adv, traj.mask, self.clip_low, self.clip_high)
