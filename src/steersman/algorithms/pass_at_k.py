"""Pass@k training (PKPO), arXiv 2505.15201: the best of k answers is what counts."""

import torch
from pydantic import Field
from torch import Tensor

from steersman.advantage.best_of import best_of_k
from steersman.advantage.gae import Advantage
from steersman.advantage.group import leave_one_out, spread
from steersman.advantage.returns import episode_return
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.loss.policy import reinforce
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class PassAtK(Algorithm):
    """The unbiased gradient of E[max of k scores] - beta KL, from groups of at least k."""

    name = "pass-at-k"
    title = "Pass@k"
    paper = "arXiv 2505.15201"
    group = True
    whole_episode = "counts the best of k whole episodes"
    bias = "maximises the expected best of k scores, not their mean"
    fixed_point = "the best policy for E[max of k scores] - beta KL"

    average: Average = Field(default="episode", description=AVERAGED_BY)
    k: int = Field(default=2, ge=1, description="answers among which the best counts; 1 is RLOO")

    def refusal(self, samples: int) -> str | None:
        return f"algorithm.k = {self.k} exceeds rollout.samples = {samples}" if self.k > samples else None

    def advantage(self, traj: Trajectory) -> Advantage:
        total = episode_return(traj)
        score = total if traj.score is None else traj.score
        group = torch.zeros_like(total, dtype=torch.long) if traj.group is None else traj.group
        adv = best_of_k(score, group, self.k) + leave_one_out(total - score, group)
        return Advantage(spread(adv, traj.mask))

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return reinforce(logp, adv)
