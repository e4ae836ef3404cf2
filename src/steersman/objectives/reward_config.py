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
        description="pairs: score heads on one trunk, each trained on its own bootstrap sample of the pairs; their "
        "standard deviation measures uncertainty (see reward.parts.NAME.pessimism)",
    )
    bottleneck: int = Field(
        default=0,
        ge=0,
        description="pairs: latents of a variational information bottleneck between trunk and score (InfoRM); 0: "
        "none",
    )
    bottleneck_weight: float = Field(
        default=0.02, ge=0, description="with bottleneck: weight of KL(latents || N(0, I)) in the loss, per nat"
    )
    planes: int = Field(
        default=0,
        ge=0,
        description="pairs: planes (two coordinates each) of a general preference model, which can learn A > B > C "
        "> A and gives no score to a single answer; 0: Bradley-Terry",
    )
    debias: list[Literal["length", "headers", "lists", "bold"]] = Field(
        default_factory=list,
        description="pairs: features whose linear effect on the score is removed after training: length, headers, "
        "lists, bold",
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
        default="spearman",
        description="the correlation with `verbosity` that is made 0 over the training answers: spearman or pearson",
    )


class EvaluationConfig(Section):
    """How a reward model is judged on held-out data."""

    subset: str | None = Field(
        default=None, description="a column of the rows (or `file`): results are also given for each of its values"
    )
    draws: int = Field(default=1000, ge=100, description="bootstrap draws behind the intervals")
