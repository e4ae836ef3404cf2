"""LUSPO, arXiv 2602.05261: GSPO whose responses weigh as much as they are long."""

from pydantic import Field

from steersman.algorithms.gspo import GSPO
from steersman.loss.reduce import AVERAGED_BY, Average


class LUSPO(GSPO):
    """GSPO's loss times the response's length, which is its sum over the tokens."""

    name = "luspo"
    title = "LUSPO"
    paper = "arXiv 2602.05261"
    bias = "scores are divided by their group's deviation"

    clip_low: float = Field(default=2e-3, gt=0, lt=1, description="sequence ratio is clipped below 1 minus this")
    clip_high: float = Field(default=2.5e-3, gt=0, description="sequence ratio is clipped above 1 plus this")
    average: Average = Field(default="episode", description=AVERAGED_BY)
