"""DPPO, arXiv 2602.04879: a trust region by divergence, not by ratio."""

from pydantic import Field
from torch import Tensor

from steersman.algorithms.base import Coefficients
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.policy import Divergence, divergence_masked
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class DPPO(GroupRelative):
    """GRPO's advantage; a token is left out where it would lead further away than the divergence allows."""

    name = "dppo"
    title = "DPPO"
    paper = "arXiv 2602.04879"
    unread = ("clip_low", "clip_high")

    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")
    average: Average = Field(default="token", description=AVERAGED_BY)
    divergence: Divergence = Field(
        default="tv",
        description="divergence from the sampler, of the sampled token against all others. tv: total variation; "
        "kl: KL",
    )
    limit: float = Field(
        default=0.15, gt=0, description="largest such divergence: a difference of probabilities for tv, nats for kl"
    )
    weight_high: float = Field(default=10.0, gt=1, description="importance weights are cut above this")

    def clip_range(self) -> None:
        return None

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return divergence_masked(logp, traj.logp_old, adv, self.limit, self.divergence, self.weight_high)
