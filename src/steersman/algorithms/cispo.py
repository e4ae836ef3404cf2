"""CISPO (MiniMax-M1), arXiv 2506.13585: bound the importance weight, keep every token's gradient."""

from pydantic import Field
from torch import Tensor

from steersman.algorithms.base import Coefficients
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.policy import clipped_weight
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class CISPO(GroupRelative):
    """GRPO's advantage; REINFORCE's loss under a bounded, detached weight."""

    name = "cispo"
    title = "CISPO"
    paper = "arXiv 2506.13585"
    unread = ("clip_low",)

    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")
    clip_high: float = Field(default=4.0, gt=0, description="importance weights are cut above 1 plus this")
    average: Average = Field(default="token", description=AVERAGED_BY)

    def clip_range(self) -> tuple[float, float]:
        return 1.0, self.clip_high

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return clipped_weight(logp, traj.logp_old, adv, 1 + self.clip_high)
