"""Every on-policy algorithm by name."""

from steersman.algorithms.a2c import A2C
from steersman.algorithms.a2po import AStarPO
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.algorithms.cispo import CISPO
from steersman.algorithms.clip_cov import ClipCov
from steersman.algorithms.dapo import DAPO
from steersman.algorithms.dppo import DPPO
from steersman.algorithms.dr_grpo import DrGRPO
from steersman.algorithms.gdpo import GDPO
from steersman.algorithms.gfpo import GFPO
from steersman.algorithms.gmpo import GMPO
from steersman.algorithms.gpg import GPG
from steersman.algorithms.grpo import GRPO
from steersman.algorithms.gspo import GSPO
from steersman.algorithms.kl_cov import KLCov
from steersman.algorithms.luspo import LUSPO
from steersman.algorithms.nlpo import NLPO
from steersman.algorithms.pass_at_k import PassAtK
from steersman.algorithms.ppo import PPO
from steersman.algorithms.ppo_kl import PPOKL
from steersman.algorithms.reinforce import REINFORCE
from steersman.algorithms.reinforce_baseline import REINFORCEBaseline
from steersman.algorithms.reinforce_pp import REINFORCEPlusPlus
from steersman.algorithms.reinforce_pp_baseline import REINFORCEPlusPlusBaseline
from steersman.algorithms.remax import ReMax
from steersman.algorithms.rloo import RLOO
from steersman.algorithms.sapo import SAPO
from steersman.algorithms.trpo import TRPO
from steersman.algorithms.vapo import VAPO
from steersman.algorithms.vc_ppo import VCPPO
from steersman.algorithms.vespo import VESPO

ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm
    for algorithm in (
        REINFORCE, REINFORCEBaseline, REINFORCEPlusPlus, RLOO, ReMax, A2C, TRPO, PPO, PPOKL, NLPO,
        VCPPO, VAPO, GRPO, DrGRPO, DAPO, GSPO, CISPO, REINFORCEPlusPlusBaseline, GMPO, SAPO, DPPO, GPG, GDPO, GFPO,
        ClipCov, KLCov, PassAtK, LUSPO, VESPO, AStarPO,
    )
}  # fmt: skip

__all__ = ["ALGORITHMS", "Algorithm", "Coefficients"]
