"""ReMax, arXiv 2310.10505: REINFORCE on the response's score minus the score of the greedy response."""

from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.advantage.group import spread
from steersman.advantage.returns import return_to_go
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.loss.policy import reinforce
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import SteersmanError, Trajectory


class ReMax(Algorithm):
    """Return-to-go minus the greedy response's score (eq. 6); unbiased, one more generation per prompt."""

    name = "remax"
    title = "ReMax"
    paper = "arXiv 2310.10505"
    baseline = "greedy"

    average: Average = Field(default="episode", description=AVERAGED_BY)

    def advantage(self, traj: Trajectory) -> Advantage:
        if traj.baseline is None:
            raise SteersmanError("ReMax needs the greedy response's score as the trajectory's baseline")
        return Advantage(return_to_go(traj) - spread(traj.baseline, traj.mask))

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return reinforce(logp, adv)
