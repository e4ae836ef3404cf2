"""GFPO, arXiv 2508.09726: sample many, learn from the short or efficient ones alone."""

from typing import Literal

import torch
from pydantic import Field

from steersman.advantage.gae import Advantage
from steersman.advantage.group import efficient_rows
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.types import Trajectory


class GFPO(GroupRelative):
    """GRPO's advantage within the part of a group that is kept; the others teach nothing."""

    name = "gfpo"
    title = "GFPO"
    paper = "arXiv 2508.09726"
    whole_episode = "keeps whole episodes, those that are short or efficient"
    bias = (
        "scores are divided by their group's deviation, tokens by a random length; responses are selected by length"
    )
    fixed_point = "among the short answers: a long one is compared only where its siblings are long too"

    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")
    average: Average = Field(default="token", description=AVERAGED_BY)
    keep: float = Field(default=0.5, gt=0, le=1, description="part of each group that is learned from, at least two")
    by: Literal["length", "efficiency"] = Field(
        default="length",
        description="which samples of a group are kept. length: the shortest; efficiency: those of highest score "
        "per token",
    )

    def advantage(self, traj: Trajectory) -> Advantage:
        kept = efficient_rows(traj, self.keep, self.by).nonzero().flatten()
        part = super().advantage(traj.rows(kept)).adv
        adv = torch.zeros_like(traj.reward)
        adv[kept, : part.shape[1]] = part
        return Advantage(adv)
