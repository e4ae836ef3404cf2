"""Settings of the reward verb that its objectives share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steersman.config.sections import Section
from steersman.train.offline import OfflineConfig

LossName = Literal["auto", "pairs", "plackett_luce", "squared", "huber"]


class RewardModelConfig(OfflineConfig):
    """How long and in what batches to train, and what the loss is made of."""

    loss: LossName = Field(
        default="auto",
        description="rankings: pairs (also auto) or plackett_luce; ratings: squared (also auto) or huber",
    )
    use_margin: bool = Field(default=True, description="use the data's margins, where it has them")
    heads: int = Field(
        default=1,
        ge=1,
        description="pairs: heads on one trunk, each on draws of its own; their deviation says how little is known",
    )
    bottleneck: int = Field(
        default=0,
        ge=0,
        description="pairs: noisy latents through which answers are read (InfoRM); 0 reads them directly",
    )
    bottleneck_weight: float = Field(
        default=0.02, ge=0, description="with bottleneck: price of a nat that an answer's latents tell"
    )
    planes: int = Field(
        default=0,
        ge=0,
        description="pairs: planes of a model of preferences that may run in circles, without scores (general "
        "preference model); 0 is Bradley-Terry",
    )
    debias: list[Literal["length", "headers", "lists", "bold"]] = Field(
        default_factory=list,
        description="pairs: what the score is freed of after training, as far as a straight line goes",
    )
    centre: float = Field(
        default=0.0,
        ge=0,
        description="weight of (r + r')^2 over pairs, or of r^2 over thumbs: scores stay around 0",
    )
    keep: Literal["last", "best"] = Field(
        default="best",
        description="which weights the saved model has: the last, or the best on held-out data, where a reward model "
        "that training began with counts too",
    )


class GatingConfig(Section):
    """The network that mixes the attributes by the prompt, and its correction for length."""

    hidden: int = Field(default=64, ge=1, description="width of its hidden layers")
    layers: int = Field(default=2, ge=1, description="hidden layers")
    verbosity: str = Field(
        default="length", description="what is taken out of every attribute: length, an attribute's name, or none"
    )
    correlation: Literal["spearman", "pearson"] = Field(
        default="spearman", description="which correlation with it becomes 0 over the training answers"
    )


class EvaluationConfig(Section):
    """How a reward model is judged on held-out data."""

    subset: str | None = Field(
        default=None, description="a column of the rows (or `file`): results are also given for each of its values"
    )
    draws: int = Field(default=1000, ge=100, description="bootstrap draws behind the intervals")
