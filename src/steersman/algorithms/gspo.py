"""GSPO, arXiv 2507.18071: GRPO's advantage with one ratio per sequence."""

from pydantic import Field
from torch import Tensor

from steersman.algorithms.base import Coefficients
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.policy import sequence_clipped, sequence_log_ratio
from steersman.types import Trajectory


class GSPO(GroupRelative):
    """The ratio is the geometric mean over a response's tokens, clipped in a far narrower range."""

    name = "gspo"
    title = "GSPO"
    whole_episode = "has one ratio for a whole episode"
    paper = "arXiv 2507.18071"
    unread = ("top_entropy",)

    clip_low: float = Field(default=3e-4, gt=0, lt=1, description="sequence ratio is clipped below 1 minus this")
    clip_high: float = Field(default=4e-4, gt=0, description="sequence ratio is clipped above 1 plus this")
    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")

    def log_ratio(self, logp: Tensor, traj: Trajectory) -> Tensor:
        return sequence_log_ratio(logp, traj.logp_old, traj.mask)

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return sequence_clipped(logp, traj.logp_old, adv, traj.mask, self.clip_low, self.clip_high)
