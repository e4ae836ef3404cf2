"""VAPO, arXiv 2504.05118: VC-PPO with a lambda by length, clip-higher, and imitation of its correct answers."""

from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage, gae, length_adaptive
from steersman.advantage.returns import judged_above
from steersman.algorithms.base import Coefficients
from steersman.algorithms.vc_ppo import VCPPO
from steersman.ops.masked import whiten
from steersman.types import Trajectory


class VAPO(VCPPO):
    """The actor's lambda is 1 - 1 / (alpha l) for a response of l tokens."""

    name = "vapo"
    title = "VAPO"
    paper = "arXiv 2504.05118"
    bias = (
        "advantages are whitened over the batch that they are estimated from, and divided by a random length; "
        "answers with a score above a threshold are imitated"
    )

    clip_high: float = Field(default=0.28, gt=0, description="ratio is clipped above 1 plus this")
    length_alpha: float | None = Field(
        default=0.05, gt=0, description="alpha of lambda = 1 - 1 / (alpha l), not below 0; null takes `lam` for all"
    )
    imitate: float = Field(default=0.1, ge=0, description="weight of -log pi of answers above `correct_above`")
    correct_above: float = Field(default=0.5, description="score before shaping above which an answer is correct")

    def advantage(self, traj: Trajectory) -> Advantage:
        if self.length_alpha is None:
            return super().advantage(traj)
        adv = gae(traj, length_adaptive(traj.mask, self.length_alpha)).adv
        return Advantage(whiten(adv, traj.mask) if self.whiten else adv, gae(traj, self.lam_critic).ret)

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        loss = super().loss(logp, traj, adv, coef)
        return loss - self.imitate * judged_above(traj, self.correct_above)[:, None] * logp
