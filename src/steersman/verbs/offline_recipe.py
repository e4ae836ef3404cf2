"""What the recipes of the offline methods on a policy have in common: pairs, and single answers."""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.data import LargeDataConfig
from steersman.distributed.parallel import ParallelConfig
from steersman.recipe.evaluation import EvaluationSection
from steersman.recipe.moving_reference import MovingReference
from steersman.recipe.sections import ModelConfig, TrainingRecipe
from steersman.run.health.limits import HealthConfig
from steersman.run.run_config import ManyRunConfig
from steersman.train.offline import PackedOfflineConfig
from steersman.train.reference_looks import SamplesConfig
from steersman.update.optimizer import OptimizerConfig

L = TypeVar("L", bound=Section)


class OfflineRecipe(TrainingRecipe, Generic[L]):
    """Offline optimisation of a policy; `loss` is the method's own section."""

    model: ModelConfig
    data: LargeDataConfig
    loss: L = Field(default_factory=dict, description="the method's own settings")  # type: ignore
    train: PackedOfflineConfig = PackedOfflineConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, warmup=0.1, schedule="linear")
    reference: str = Field(default="start", description="start (the policy before training) or a folder")
    moving_reference: MovingReference | None = Field(
        default=None,
        description="a reference that follows the policy as it learns (docs/algorithms.md, A reference that moves); "
        "null: it stays as it is",
    )
    offload: bool = Field(
        default=False,
        description="the reference waits in the CPU's memory and is on the device only while it is read: once "
        "before the first update and at every evaluation (kto: once an update too). Weights whose file is in half "
        "precision stay so while they wait. One that is read before the first update alone (samples.prompts: 0) "
        "waits anyway, whole and not quantised",
    )
    samples: SamplesConfig = SamplesConfig()
    evaluation: EvaluationSection | None = Field(
        default=None, description="what else is measured of the policy at every evaluation, beside the loss"
    )
    run: ManyRunConfig = ManyRunConfig()
    parallel: ParallelConfig = ParallelConfig()
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _can_begin(self) -> OfflineRecipe[L]:
        if self.model.scratch is not None:
            raise ValueError("model.scratch: a model with fresh weights prefers nothing yet; train it with sft first")
        self.data.require_end(self.train.max_steps)
        self.train.require_kept(self.run)
        return self

    @property
    def separate_reference(self) -> bool:
        """Whether a reference with weights of its own is read."""
        return self.reference != "start" or self.model.lora is None or self.moving_reference is not None

    @property
    def reads_reference_in_updates(self) -> bool:
        """Whether every micro-batch reads the reference, so that it is never idle."""
        return self.data.large or self.moving_reference is not None

    @property
    def reads_reference_between_updates(self) -> bool:
        """Whether it is read again, now and then, after the first update."""
        return self.samples.count(True) > 0

    @property
    def reference_waits(self) -> bool:
        """Whether the reference waits in the CPU's memory while nobody reads it: as `offload` asks, and where it is
        never read again once training has begun."""
        again = self.reads_reference_in_updates or self.reads_reference_between_updates
        movable = not self.parallel.in_pieces and self.model.quantise == "none"
        return self.offload or (movable and self.separate_reference and not again)

    @model_validator(mode="after")
    def _offload_fits(self) -> OfflineRecipe[L]:
        if not self.offload:
            return self
        self._require_movable()
        if not self.separate_reference:
            raise ValueError("offload: there is no reference of its own to move; remove it")
        if self.reads_reference_in_updates:
            raise ValueError(
                "offload: the reference is read in every micro-batch (data.stream, data.cache, moving_reference, or "
                "a loss of whole distributions), so it is never idle; remove offload"
            )
        return self

    @model_validator(mode="after")
    def _moves_as_it_can(self) -> OfflineRecipe[L]:
        """What refuses a reference that moves."""
        section = self.moving_reference
        if section is None:
            return self
        if self.reference != "start":
            raise ValueError(
                f"moving_reference begins as the policy before training, and reference is {self.reference}; remove "
                "one of the two"
            )
        if self.parallel.stage:
            raise ValueError(
                f"moving_reference: parallel.mode {self.parallel.mode} is not for it; use mode: fsdp, or replicas"
            )
        if self.train.keep == "best" and section.is_hard and self.run.eval_every % section.every == 0:
            raise ValueError(
                f"train.keep is best, but the reference becomes the policy every {section.every} updates and every "
                f"evaluation comes right after that (run.eval_every {self.run.eval_every}), where all margins are 0 "
                "and no weights are better than others; choose a moving_reference.every that does not divide "
                "run.eval_every, or train.keep: last"
            )
        return self
