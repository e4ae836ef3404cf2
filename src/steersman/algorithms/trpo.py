"""TRPO, arXiv 1502.05477: PPO's advantage, the unclipped surrogate, a natural-gradient step inside a KL ball.

Departures: advantages by GAE (as in arXiv 1506.02438); the critic is fitted by gradient steps.
"""

from pydantic import Field
from torch import Tensor

from steersman.algorithms.base import Coefficients, TrustRegion
from steersman.algorithms.ppo import PPO
from steersman.loss.policy import surrogate
from steersman.types import Trajectory


class TRPO(PPO):
    """One conjugate-gradient step per iteration with a line search on KL(old || new) and improvement."""

    name = "trpo"
    title = "TRPO"
    paper = "arXiv 1502.05477"
    update = "trust_region"
    unread = ("clip_low", "clip_high", "dual_clip", "off_policy_threshold")

    max_kl: float = Field(default=0.01, gt=0, description="trust region: mean KL(old || new) in nats per token")
    cg_steps: int = Field(default=10, ge=1, description="conjugate-gradient iterations")
    damping: float = Field(default=0.1, ge=0, description="added to the Fisher matrix's diagonal")
    backtracks: int = Field(default=10, ge=1, description="how often the line search may shrink the step")
    backtrack_ratio: float = Field(default=0.8, gt=0, lt=1, description="by how much it shrinks each time")
    epochs: int = Field(default=4, ge=1, description="the critic's passes over the samples of one iteration")

    def clip_range(self) -> None:
        return None

    def trust_region(self) -> TrustRegion:
        return TrustRegion(self.max_kl, self.cg_steps, self.damping, self.backtracks, self.backtrack_ratio)

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return surrogate(logp, traj.logp_old, adv)
