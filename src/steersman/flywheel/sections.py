"""Recipe sections that the loops share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from steersman.data import DataConfig
from steersman.judge import JudgeConfig
from steersman.recipe.sections import ModelConfig, RolloutConfig
from steersman.reward import RewardPart
from steersman.run.config import Section
from steersman.run.parallel import ParallelConfig
from steersman.run.run_config import ManyRunConfig

Unfinished = Literal["drop", "trim", "keep"]


class LoopRecipe(Section):
    """What every loop needs: a model, prompts, a judge, and how answers are sampled."""

    model: ModelConfig
    data: DataConfig
    judge: JudgeConfig
    watch: dict[str, RewardPart] = Field(
        default_factory=dict, description="name: reward that only watches held-out answers, apart from the judge"
    )
    rollout: RolloutConfig = Field(
        default=RolloutConfig(prompts=64, samples=4), description="prompts per round and answers per prompt"
    )
    unfinished: Unfinished = Field(
        default="drop", description="answers cut by the length limit: leave out, trim to their last sentence, or keep"
    )
    rounds: int = Field(default=3, ge=1, description="times around")
    run: ManyRunConfig = ManyRunConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _can_begin(self) -> LoopRecipe:
        if self.model.scratch is not None:
            raise ValueError(
                "model.scratch: a model with fresh weights has nothing to say yet; train it with sft first"
            )
        if self.run.devices > 1 and self.rollout.engine != "inside":
            raise ValueError(
                "run.devices: sampling by other processes goes with one device so far; use rollout.engine: inside"
            )
        if self.rollout.held_out < 1:
            raise ValueError("rollout.held_out is 0: a loop needs held-out prompts to tell what a round gained")
        return self
