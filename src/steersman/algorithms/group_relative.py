"""What GRPO and its relatives share: a response's score against its group's mean, and PPO's clip."""

import torch
from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.advantage.group import DIVIDES_BY, GroupScale, group_mean, spread
from steersman.advantage.returns import episode_return
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.loss.policy import clipped
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class GroupRelative(Algorithm):
    """What the family shares: a response against its group's mean, and no critic.

    GRPO alone names a KL term. The others have none (beta = 0); where a user sets one it goes into the reward, as
    for every method of this project that names no other place, so that pi* stays where training comes to rest: at
    pi* all answers to a prompt have the same return, so no comparison of returns can move it. The deviation is that
    of the scores without KL, and a group whose scores are all equal teaches nothing, whatever its KL.
    """

    group = True
    own_in_baseline = True
    bias = "scores are divided by their group's deviation, tokens by a random length"

    scale: GroupScale = Field(default="group", description=DIVIDES_BY)
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="ratio is clipped below 1 minus this")
    clip_high: float = Field(default=0.2, gt=0, description="ratio is clipped above 1 plus this")
    average: Average = Field(default="sequence", description=AVERAGED_BY)

    def clip_range(self) -> tuple[float, float] | None:
        return self.clip_low, self.clip_high

    def advantage(self, traj: Trajectory) -> Advantage:
        total = episode_return(traj)
        group = torch.zeros_like(total, dtype=torch.long) if traj.group is None else traj.group
        return Advantage(spread(group_mean(total, group, self.scale, deviation_of=traj.score), traj.mask))

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return clipped(logp, traj.logp_old, adv, self.clip_low, self.clip_high)
