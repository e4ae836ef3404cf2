"""REINFORCE++ with the group's mean as baseline, arXiv 2501.03262, section 3.3: several responses per prompt."""

from typing import Literal

from pydantic import Field

from steersman.advantage.gae import Advantage
from steersman.advantage.group import DIVIDES_BY, GroupScale
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.ops.kl import KLEstimator
from steersman.ops.masked import whiten
from steersman.types import Trajectory


class REINFORCEPlusPlusBaseline(GroupRelative):
    """The lead over the group's mean, normalised over the whole batch; KL as k2 in the loss."""

    name = "reinforce++-baseline"
    title = "REINFORCE++ baseline"
    paper = "arXiv 2501.03262"
    bias = (
        "advantages are whitened over the batch that they are estimated from, and divided by a random length; "
        "the KL term is k2 in the loss"
    )
    fixed_point = "beta counts in deviations of the return, and k2 holds each token alone to the reference"
    unread = ("scale",)

    scale: GroupScale = Field(default="none", description=DIVIDES_BY)
    kl_in: Literal["reward", "loss"] = Field(
        default="loss", description="where the KL term goes: into every token's reward, or into the loss"
    )
    kl_estimator: KLEstimator = Field(default="k2", description="k1, k2, k3 or k1_to_go; see steersman.ops.kl")
    average: Average = Field(default="token", description=AVERAGED_BY)
    whiten: bool = Field(default=True, description="advantages to mean 0, variance 1 over the steps of an iteration")

    def advantage(self, traj: Trajectory) -> Advantage:
        adv = super().advantage(traj).adv
        return Advantage(whiten(adv, traj.mask) if self.whiten else adv)
