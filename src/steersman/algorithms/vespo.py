"""VESPO, arXiv 2602.10693: a smooth weight on whole responses in the place of the clip."""

from pydantic import Field
from torch import Tensor

from steersman.algorithms.base import Coefficients
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.policy import gamma_weighted
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class VESPO(GroupRelative):
    """GRPO's advantage; REINFORCE's loss, weighted by how likely the whole response has become."""

    name = "vespo"
    title = "VESPO"
    whole_episode = "has one ratio for a whole episode"
    paper = "arXiv 2602.10693"
    unread = ("clip_low", "clip_high")

    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")
    average: Average = Field(default="token", description=AVERAGED_BY)
    k_positive: float = Field(
        default=2.0, gt=0, description="power of W in the weight W^k exp(lambda (1 - W)), advantage 0 or above"
    )
    lambda_positive: float = Field(default=3.0, gt=0, description="lambda of that weight, advantage 0 or above")
    k_negative: float = Field(default=3.0, gt=0, description="power of W, advantage below 0")
    lambda_negative: float = Field(default=2.0, gt=0, description="lambda, advantage below 0")

    def clip_range(self) -> None:
        return None

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        positive, negative = (self.k_positive, self.lambda_positive), (self.k_negative, self.lambda_negative)
        return gamma_weighted(logp, traj.logp_old, adv, traj.mask, positive, negative)
