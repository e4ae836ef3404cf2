"""GDPO, arXiv 2601.05242: several rewards, each standardised within its group before they are added."""

from pydantic import Field

from steersman.advantage.gae import Advantage
from steersman.advantage.group import decoupled, spread
from steersman.algorithms.grpo import GRPO
from steersman.ops.masked import whiten
from steersman.types import Trajectory


class GDPO(GRPO):
    """No reward drowns another because its scores are spread wider; the sum is normalised over the batch."""

    name = "gdpo"
    title = "GDPO"
    paper = "arXiv 2601.05242"
    parts = True
    bias = (
        "every reward is divided by its group's deviation; advantages are whitened over the batch that they are "
        "estimated from, and divided by a random length; the KL term is k3 in the loss"
    )

    whiten: bool = Field(default=True, description="advantages to mean 0, variance 1 over the steps of an iteration")

    def advantage(self, traj: Trajectory) -> Advantage:
        adv = spread(decoupled(traj, self.scale), traj.mask)
        return Advantage(whiten(adv, traj.mask) if self.whiten else adv)
