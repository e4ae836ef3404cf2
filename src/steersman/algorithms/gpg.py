"""GPG, arXiv 2504.02546: the group's mean as baseline, REINFORCE's loss, and weight for groups that say nothing."""

from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.advantage.group import DIVIDES_BY, GroupScale, signal_weight
from steersman.algorithms.base import Coefficients
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.policy import reinforce
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class GPG(GroupRelative):
    """No ratio and no clip; groups whose scores differ count for those whose scores do not."""

    name = "gpg"
    title = "GPG"
    paper = "arXiv 2504.02546"
    bias = "tokens are divided by a random length; groups with a signal weigh more the fewer they are"
    unread = ("clip_low", "clip_high")

    scale: GroupScale = Field(default="none", description=DIVIDES_BY)
    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")
    average: Average = Field(default="token", description=AVERAGED_BY)
    reweigh: bool = Field(
        default=True, description="multiply advantages by (all responses) / (responses in groups whose scores differ)"
    )

    def clip_range(self) -> None:
        return None

    def advantage(self, traj: Trajectory) -> Advantage:
        adv = super().advantage(traj).adv
        return Advantage(adv * signal_weight(traj) if self.reweigh else adv)

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return reinforce(logp, adv)
