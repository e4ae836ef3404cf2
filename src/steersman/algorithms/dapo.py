"""DAPO, arXiv 2503.14476: GRPO with an asymmetric clip, token-level averaging, dynamic sampling, no KL."""

from pydantic import Field

from steersman.algorithms.group_relative import GroupRelative
from steersman.loss.reduce import AVERAGED_BY, Average


class DAPO(GroupRelative):
    """Clip-higher and dynamic sampling; the soft punishment of long responses is `reward.overlong_buffer`."""

    name = "dapo"
    title = "DAPO"
    paper = "arXiv 2503.14476"
    bias = "scores are divided by their group's deviation, tokens by a random length; groups are selected"

    beta: float = Field(default=0.0, ge=0, description="coefficient of KL(policy || reference)")
    clip_high: float = Field(default=0.28, gt=0, description="ratio is clipped above 1 plus this")
    average: Average = Field(default="token", description=AVERAGED_BY)
    dynamic_sampling: int = Field(
        default=3,
        ge=0,
        description="how many further rounds may be sampled to replace groups whose scores are all equal",
    )

    def resampling(self) -> int:
        return self.dynamic_sampling
