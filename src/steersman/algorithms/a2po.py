"""A*-PO, arXiv 2505.20686: the policy's log-ratio to the reference is fitted to the optimal advantage."""

from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.advantage.group import spread
from steersman.advantage.returns import episode_return
from steersman.algorithms.base import Algorithm, Coefficients, OptimalValue
from steersman.loss.policy import advantage_regression
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import SteersmanError, Trajectory


class AStarPO(Algorithm):
    """Least squares of beta log(pi / pi_ref) against r - V*(x), on the policy's own responses.

    V*(x) is estimated once, before training, from responses of the reference (`optimal_value`). The KL term is part
    of the square, so nothing is taken off the reward.
    """

    name = "a2po"
    title = "A*-PO"
    paper = "arXiv 2505.20686"
    baseline = "optimal"
    unread = ("gamma", "kl_in", "kl_estimator", "average", "top_entropy")

    beta: float = Field(default=1e-3, gt=0, description="coefficient of KL(policy || reference); the paper's beta_2")
    average: Average = Field(default="sequence", description=AVERAGED_BY)
    value_beta: float = Field(
        default=0.5, gt=0, description="beta of V*(x) = beta log mean exp(r / beta), its estimate; the paper's beta_1"
    )
    value_samples: int = Field(
        default=8, ge=1, description="responses of the reference to each prompt that V*(x) is estimated from"
    )
    solved_above: float | None = Field(
        default=None,
        description="leave out the prompts of which no response of the reference scores above this (for scores of 0 "
        "and 1: 0); null: none",
    )

    def gradient_scale(self) -> float:
        return 2 * self.beta

    def optimal_value(self) -> OptimalValue:
        return OptimalValue(self.value_beta, self.value_samples, self.solved_above)

    def advantage(self, traj: Trajectory) -> Advantage:
        if traj.baseline is None:
            raise SteersmanError("A*-PO needs the optimal value of each row's prompt as the trajectory's baseline")
        score = episode_return(traj) if traj.score is None else traj.score
        return Advantage(spread(score - traj.baseline, traj.mask))

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        assert traj.logp_ref is not None
        return advantage_regression(logp, traj.logp_ref, adv, traj.mask, coef.beta)
