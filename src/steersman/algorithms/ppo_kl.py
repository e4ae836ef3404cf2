"""PPO with an adaptive KL penalty instead of the clip, arXiv 1707.06347, section 4.

The penalty is on KL(old || new), estimated by k3 at the old policy's own samples (exp(d) - 1 - d with
d = log new - log old), whose gradient is exact; the coefficient halves or doubles around `target_old`.
"""

from pydantic import Field
from torch import Tensor

from steersman.algorithms.base import Coefficients
from steersman.algorithms.ppo import PPO
from steersman.loss.policy import surrogate
from steersman.ops.kl import kl_estimate
from steersman.types import Trajectory


class PPOKL(PPO):
    """PPO's advantage, unclipped ratio, and a penalty on the step away from the policy that sampled."""

    name = "ppo-kl"
    title = "PPO (KL penalty)"
    unread = ("clip_low", "clip_high", "dual_clip")

    beta_old: float = Field(default=1.0, ge=0, description="initial coefficient of KL(old || new)")
    target_old: float = Field(default=0.01, gt=0, description="KL(old || new) per token that the coefficient aims at")

    def clip_range(self) -> None:
        return None

    def kl_to_sampler(self) -> tuple[float, float] | None:
        return self.beta_old, self.target_old

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        step = kl_estimate(traj.logp_old, logp, "k3")
        return surrogate(logp, traj.logp_old, adv) + coef.beta_old * step
