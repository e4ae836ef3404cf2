"""Every on-policy algorithm by name."""

from steersman.algorithms.a2c import A2C
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.algorithms.cispo import CISPO
from steersman.algorithms.dapo import DAPO
from steersman.algorithms.dr_grpo import DrGRPO
from steersman.algorithms.grpo import GRPO
from steersman.algorithms.gspo import GSPO
from steersman.algorithms.nlpo import NLPO
from steersman.algorithms.ppo import PPO
from steersman.algorithms.ppo_kl import PPOKL
from steersman.algorithms.reinforce import REINFORCE
from steersman.algorithms.reinforce_baseline import REINFORCEBaseline
from steersman.algorithms.reinforce_pp import REINFORCEPlusPlus
from steersman.algorithms.remax import ReMax
from steersman.algorithms.rloo import RLOO
from steersman.algorithms.trpo import TRPO

ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm
    for algorithm in (
        REINFORCE, REINFORCEBaseline, REINFORCEPlusPlus, RLOO, ReMax, A2C, TRPO, PPO, PPOKL, NLPO,
        GRPO, DrGRPO, DAPO, GSPO, CISPO,
    )
}  # fmt: skip

__all__ = ["ALGORITHMS", "Algorithm", "Coefficients"]
