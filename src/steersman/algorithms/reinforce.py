"""REINFORCE, Williams 1992: return-to-go times the score function.

Departure: the optional moving baseline is the mean return of earlier iterations, so it does not depend on the
samples that it is subtracted from and leaves the gradient unbiased.
"""

from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.advantage.group import spread
from steersman.advantage.returns import return_to_go
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.loss.policy import reinforce
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class REINFORCE(Algorithm):
    """Return-to-go minus a moving baseline, times log-probability."""

    name = "reinforce"
    title = "REINFORCE"
    paper = "Williams 1992"
    baseline = "moving"

    average: Average = Field(default="episode", description=AVERAGED_BY)

    def advantage(self, traj: Trajectory) -> Advantage:
        adv = return_to_go(traj)
        return Advantage(adv if traj.baseline is None else adv - spread(traj.baseline, traj.mask))

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return reinforce(logp, adv)
