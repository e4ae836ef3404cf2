"""Recipe sections that the loops share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.data import DataConfig, keys_of_other_kinds
from steersman.distributed.parallel import WithoutZeroConfig
from steersman.flywheel.stages import PLACE, below, refresh_values, require_stage
from steersman.judge import JudgeConfig
from steersman.model.adapter_files import saved_lora
from steersman.objectives.reward_config import RewardModelConfig
from steersman.recipe.sections import ModelConfig, RolloutConfig, adapter_defaults, adapter_rates
from steersman.recipe.stopping import StopConfig
from steersman.reward import RewardPart
from steersman.run.run_config import ManyRunConfig
from steersman.update.optimizer import OptimizerConfig
from steersman.verbs.reward_recipe import RewardModelRecipe

Unfinished = Literal["drop", "trim", "keep"]


class RefreshConfig(Section):
    """Trains the judge's reward model again after each round, on the model's newest answers."""

    by: str = Field(
        description="name under `watch` of a stronger (more expensive) judge; it compares the newest answers, and "
        "the judge's reward model is trained on what it prefers"
    )
    first: list[str] = Field(
        default_factory=list, description="files of the pairs that the judge's reward model was first trained on"
    )
    train: RewardModelConfig = RewardModelConfig(keep="last")
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)


class LoopRecipe(Section):
    """What every loop needs: a model, prompts, a judge, and how answers are sampled."""

    model: ModelConfig
    data: DataConfig
    judge: JudgeConfig
    watch: dict[str, RewardPart] = Field(
        default_factory=dict,
        description="name: a reward that is measured on held-out answers, independent of the judge",
    )
    rollout: RolloutConfig = Field(
        default=RolloutConfig(prompts=64, samples=4), description="prompts per round and answers per prompt"
    )
    unfinished: Unfinished = Field(
        default="drop",
        description="answers cut off by the length limit. drop: leave out; trim: cut back to the last whole "
        "sentence; keep: use as they are",
    )
    rounds: int = Field(default=3, ge=1, description="number of rounds")
    stop: StopConfig | None = Field(
        default=None,
        description="stop early: when a watched reward no longer improves from round to round, or KL exceeds its "
        "budget",
    )
    refresh: RefreshConfig | None = Field(
        default=None, description="train the judge's reward model again after each round, on the newest answers"
    )
    run: ManyRunConfig = ManyRunConfig()
    parallel: WithoutZeroConfig = WithoutZeroConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return keys_of_other_kinds("query")

    @classmethod
    def dependent_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        refreshed = ["refresh.optimizer"] if isinstance(given.get("refresh"), dict) else []
        defaults = adapter_defaults(given, *cls.trained_by(given), *refreshed)
        if not defaults and refreshed and any(map(saved_lora, _reward_models(given.get("judge")))):
            return adapter_rates(*refreshed)
        return defaults

    @classmethod
    def trained_by(cls, given: dict[str, Any]) -> list[str]:
        """Dotted keys of the optimizers that a round trains by, of a recipe as it is given."""
        return []

    def require_stage(
        self, name: str, kind: type[Section], values: dict[str, Any], words: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Raises ValueError where a verb's recipe refuses what a round will hand to it (`stages.require_stage`)."""
        require_stage(name, kind, {**values, "parallel": self.parallel.model_dump()}, self.run, words)

    @model_validator(mode="after")
    def _can_begin(self) -> LoopRecipe:
        if self.model.scratch is not None:
            raise ValueError(
                "model.scratch: a model with fresh weights has nothing to say yet; train it with sft first"
            )
        if self.run.ranks > 1 and self.rollout.engine != "inside":
            raise ValueError(
                "run.devices: sampling by other processes goes with one device so far; use rollout.engine: inside"
            )
        if self.refresh is not None:
            if self.refresh.by not in self.watch:
                raise ValueError(
                    f"refresh.by is {self.refresh.by!r}, which nothing under `watch` is called; there are: "
                    f"{', '.join(self.watch) or 'none'}"
                )
            values = refresh_values(self, self.judge.reward_model()[1], [PLACE])
            self.require_stage("refresh", RewardModelRecipe, values, below("refresh", "train", "optimizer"))
        if self.stop is not None and self.stop.judge not in self.watch:
            raise ValueError(
                f"stop.judge is {self.stop.judge!r}, which nothing under `watch` is called; there are: "
                f"{', '.join(self.watch) or 'none'}"
            )
        if self.rollout.held_out < 1:
            raise ValueError("rollout.held_out is 0: a loop needs held-out prompts to tell what a round gained")
        return self


def _reward_models(judge: Any) -> list[str]:
    """Paths of the judge's reward models, of a recipe as it is given."""
    parts = judge.get("reward") if isinstance(judge, dict) else None
    found = parts.values() if isinstance(parts, dict) else []
    return [str(part["model"]) for part in found if isinstance(part, dict) and "model" in part]


def refuse_idle_stages(stages: Mapping[str, Section], asked: Sequence[str], key: str) -> None:
    """Raises ValueError where a stage has own settings, and `asked`, the recipe's list `key`, leaves it out."""
    for name, section in stages.items():
        if name not in asked and section != type(section)():
            raise ValueError(
                f"{name}: nothing reads this section, since `{key}` is {list(asked)}; remove it, or add {name} to "
                f"`{key}`"
            )
