"""The recipe of `steersman reward`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.data import LargeDataConfig
from steersman.distributed.parallel import ParallelConfig
from steersman.objectives.reward_config import EvaluationConfig, GatingConfig, RewardModelConfig
from steersman.recipe.sections import ModelConfig, TrainingRecipe
from steersman.run.health.limits import HealthConfig
from steersman.run.run_config import ManyRunConfig
from steersman.update.optimizer import OptimizerConfig


class RewardModelRecipe(TrainingRecipe):
    """A reward model of one number, of several attributes, or of steps, from a base, SFT or reward model."""

    model: ModelConfig
    data: LargeDataConfig
    kind: Literal["auto", "preference", "ranking", "rating", "feedback", "steps"] = Field(
        default="auto",
        description="what the data is used as: preference (pairs), ranking, rating (scores), feedback (thumbs), "
        "steps (labels of steps), or auto (what its columns show; a line says which)",
    )
    stage: Literal["train", "gating", "evaluate"] = Field(
        default="train",
        description="train: train a reward model; gating: learn from preferences how to mix a trained model's "
        "attributes; evaluate: only evaluate a model",
    )
    train: RewardModelConfig = RewardModelConfig()
    gating: GatingConfig = GatingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)
    run: ManyRunConfig = ManyRunConfig()
    parallel: ParallelConfig = ParallelConfig()
    health: HealthConfig = HealthConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return frozenset({"model.scratch", "data.opening_words"})

    @classmethod
    def dependent_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        return super().dependent_defaults(given) if given.get("stage", "train") == "train" else {}

    @model_validator(mode="after")
    def _fits(self) -> RewardModelRecipe:
        if self.model.lora is not None and self.stage != "train":
            raise ValueError(f"model.lora: stage {self.stage} trains no weights of the model; remove the section")
        if self.stage != "evaluate":
            self.train.require_kept(self.run)
        several = [f"train.{key}" for key in ("bottleneck", "planes") if getattr(self.train, key)]
        several += ["train.heads"] * (self.train.heads > 1)
        if len(several) > 1:
            raise ValueError(f"{' and '.join(several)} are different kinds of reward model; give one of them")
        if not self.train.bottleneck and self.train.bottleneck_weight != RewardModelConfig().bottleneck_weight:
            raise ValueError("train.bottleneck_weight: there is no bottleneck; give train.bottleneck, or remove it")
        if self.train.heads > 1 and self.parallel.stage:
            raise ValueError(
                f"train.heads: parallel.mode {self.parallel.mode} is not for ensembles; use replicas or fsdp"
            )
        if self.stage == "gating" and self.parallel.stage:
            raise ValueError(
                f"parallel.mode {self.parallel.mode}: stage gating trains a small network beside a frozen model, "
                "which DeepSpeed does not serve; use fsdp or replicas"
            )
        if self.train.debias and (several or self.stage != "train"):
            raise ValueError("train.debias is for a reward model of one number, at the end of stage train")
        if self.data.large:
            self._fits_large()
        if self.train.bottleneck and self.model.lora is not None and not self.model.merge:
            raise ValueError("train.bottleneck has a layer that no file of adapters holds; set model.merge: true")
        return self

    def _fits_large(self) -> None:
        """Raises ValueError for what goes through all rows by itself."""
        key = "stream" if self.data.stream else "cache"
        self.data.require_end(self.train.max_steps)
        if self.stage != "train":
            raise ValueError(f"data.{key} is for stage train; stage {self.stage} takes rows that are in memory")
        if self.data.stream and (self.train.heads > 1 or self.train.debias):
            raise ValueError(
                "train.heads and train.debias go through all rows, which a stream does not; use data.cache"
            )
        if self.evaluation.subset is not None and self.data.held_out:
            raise ValueError(
                f"evaluation.subset is a column of held-out rows, and data.{key} keeps no columns; give data."
                "held_out_files in the place of data.held_out"
            )
