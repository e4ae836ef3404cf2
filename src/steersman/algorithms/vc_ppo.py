"""VC-PPO, arXiv 2503.01491: PPO whose critic learns from whole returns, and is trained before the policy."""

from pydantic import Field

from steersman.advantage.gae import Advantage, gae
from steersman.algorithms.ppo import PPO
from steersman.types import Trajectory


class VCPPO(PPO):
    """Decoupled GAE: one lambda for the policy's advantages, one for the critic's targets.

    The paper's value pretraining is `critic.warmup`: iterations in which the policy stays as it is.
    """

    name = "vc-ppo"
    title = "VC-PPO"
    paper = "arXiv 2503.01491"

    lam_critic: float = Field(
        default=1.0, ge=0, le=1, description="lambda of the critic's targets; 1 is the whole return"
    )

    def advantage(self, traj: Trajectory) -> Advantage:
        return Advantage(super().advantage(traj).adv, gae(traj, self.lam_critic).ret)
