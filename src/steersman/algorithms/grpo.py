"""GRPO, arXiv 2402.03300: a response's score standardised within its group, PPO's clip, KL in the loss."""

from typing import Literal

from pydantic import Field

from steersman.algorithms.group_relative import GroupRelative
from steersman.ops.kl import KLEstimator


class GRPO(GroupRelative):
    """Group-relative advantage, k3 in the loss (eq. 4)."""

    name = "grpo"
    title = "GRPO"
    paper = "arXiv 2402.03300"
    bias = "scores are divided by their group's deviation, tokens by a random length; the KL term is k3 in the loss"
    fixed_point = "beta (pi_ref - pi) balances pi A: heavier tails than pi*, and A counts in deviations of the score"

    kl_in: Literal["reward", "loss"] = Field(
        default="loss", description="where the KL term goes: into every token's reward, or into the loss"
    )
    kl_estimator: KLEstimator = Field(default="k3", description="k1, k2, k3 or k1_to_go; see steersman.ops.kl")
