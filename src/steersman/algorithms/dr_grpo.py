"""Dr.GRPO, arXiv 2503.20783: GRPO without the two divisions that bias it (deviation and response length)."""

from pydantic import Field

from steersman.advantage.group import DIVIDES_BY, GroupScale
from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.reduce import AVERAGED_BY, Average


class DrGRPO(GroupRelative):
    """GRPO done right: group mean as baseline, a fixed length as divisor, no KL term by default."""

    name = "dr-grpo"
    title = "Dr.GRPO"
    paper = "arXiv 2503.20783"
    bias = "the baseline contains the sample itself: (G - 1) / G times the exact gradient"

    scale: GroupScale = Field(default="none", description=DIVIDES_BY)
    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")
    average: Average = Field(default="episode", description=AVERAGED_BY)
