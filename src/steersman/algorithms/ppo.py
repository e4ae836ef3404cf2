"""PPO with the clipped objective, arXiv 1707.06347; for language models arXiv 1909.08593 and 2203.02155."""

from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage, gae
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.loss.policy import clipped
from steersman.ops.masked import whiten
from steersman.types import Trajectory


class PPO(Algorithm):
    """GAE with a critic, whitened; the ratio is clipped and the samples are used for several epochs."""

    name = "ppo"
    title = "PPO"
    paper = "arXiv 1707.06347"
    critic = True
    bias = "advantages are whitened over the batch that they are estimated from, and divided by a random length"

    lam: float = Field(default=0.95, ge=0, le=1, description="GAE's lambda: 1 is Monte-Carlo minus V, 0 one-step")
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="ratio is clipped below 1 minus this")
    clip_high: float = Field(default=0.2, gt=0, description="ratio is clipped above 1 plus this")
    dual_clip: float | None = Field(
        default=None, gt=1, description="bound on the loss of negative advantages, in units of |advantage|"
    )
    whiten: bool = Field(default=True, description="advantages to mean 0, variance 1 over the steps of an iteration")
    epochs: int = Field(default=4, ge=1, description="passes over the samples of one iteration")
    minibatches: int = Field(default=2, ge=1, description="optimizer updates per epoch")

    def clip_range(self) -> tuple[float, float] | None:
        return self.clip_low, self.clip_high

    def advantage(self, traj: Trajectory) -> Advantage:
        adv, ret = gae(traj, self.lam)
        return Advantage(whiten(adv, traj.mask) if self.whiten else adv, ret)

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return clipped(logp, traj.logp_old, adv, self.clip_low, self.clip_high, self.dual_clip)
