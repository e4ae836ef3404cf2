"""REINFORCE++, arXiv 2501.03262: PPO's clipped loss without a critic.

The advantage is the return-to-go of the KL-shaped reward, normalised over the whole batch (section 3.2).
"""

from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.advantage.returns import return_to_go
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.loss.policy import clipped
from steersman.ops.masked import whiten
from steersman.types import Trajectory


class REINFORCEPlusPlus(Algorithm):
    """Batch-normalised return-to-go, clipped ratio, no critic."""

    name = "reinforce++"
    title = "REINFORCE++"
    paper = "arXiv 2501.03262"
    bias = "advantages are whitened over the batch that they are estimated from, and divided by a random length"

    clip_low: float = Field(default=0.2, gt=0, lt=1, description="ratio is clipped below 1 minus this")
    clip_high: float = Field(default=0.2, gt=0, description="ratio is clipped above 1 plus this")
    whiten: bool = Field(default=True, description="advantages to mean 0, variance 1 over the steps of an iteration")

    def advantage(self, traj: Trajectory) -> Advantage:
        adv = return_to_go(traj)
        return Advantage(whiten(adv, traj.mask) if self.whiten else adv)

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return clipped(logp, traj.logp_old, adv, self.clip_low, self.clip_high)
