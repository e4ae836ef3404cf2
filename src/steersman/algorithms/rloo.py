"""RLOO, arXiv 2402.14740: a response's whole return against the mean of its siblings', with REINFORCE's loss."""

import torch
from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.advantage.group import leave_one_out, spread
from steersman.advantage.returns import episode_return
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.loss.policy import reinforce
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class RLOO(Algorithm):
    """Leave-one-out baseline over the samples of a prompt; the response is one action."""

    name = "rloo"
    title = "RLOO"
    paper = "arXiv 2402.14740"
    group = True

    average: Average = Field(default="episode", description=AVERAGED_BY)

    def advantage(self, traj: Trajectory) -> Advantage:
        total = episode_return(traj)
        group = torch.zeros_like(total, dtype=torch.long) if traj.group is None else traj.group
        return Advantage(spread(leave_one_out(total, group), traj.mask))

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return reinforce(logp, adv)
