"""A2C, arXiv 1602.01783 (the synchronous form): GAE with a critic and the plain score-function loss."""

from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage, gae
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.loss.policy import reinforce
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class A2C(Algorithm):
    """Advantage actor-critic. Unbiased where the critic is exact, or with lam = 1 whatever the critic."""

    name = "a2c"
    title = "A2C"
    paper = "arXiv 1602.01783"
    critic = True

    lam: float = Field(default=1.0, ge=0, le=1, description="GAE's lambda: 1 is Monte-Carlo minus V, 0 one-step")
    average: Average = Field(default="episode", description=AVERAGED_BY)

    def advantage(self, traj: Trajectory) -> Advantage:
        return gae(traj, self.lam)

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return reinforce(logp, adv)
