"""SAPO, arXiv 2511.20347: a soft gate in the place of the clip."""

from pydantic import Field
from torch import Tensor

from steersman.algorithms.base import Coefficients
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.policy import soft_gated
from steersman.types import Trajectory


class SAPO(GroupRelative):
    """GRPO's advantage; a token's gradient fades with its ratio, faster for negative advantages."""

    name = "sapo"
    title = "SAPO"
    paper = "arXiv 2511.20347"
    unread = ("clip_low", "clip_high")

    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")
    tau_positive: float = Field(
        default=1.0,
        gt=0,
        description="temperature of the sigmoid gate on the ratio where the advantage is above 0; larger closes it "
        "faster",
    )
    tau_negative: float = Field(default=1.05, gt=0, description="the same where the advantage is below 0")

    def clip_range(self) -> None:
        return None

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return soft_gated(logp, traj.logp_old, adv, self.tau_positive, self.tau_negative)
