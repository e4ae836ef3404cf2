"""The recipe of the on-policy verbs: one section per stage; `algorithm` is the algorithm itself."""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import Field, model_validator

from steersman.algorithms.base import Algorithm
from steersman.data import DataConfig
from steersman.reward import RewardConfig
from steersman.run.config import Section
from steersman.run.health import HealthConfig
from steersman.train.sections import ModelConfig, RolloutConfig, RunConfig
from steersman.update.optimizer import OptimizerConfig

A = TypeVar("A", bound=Algorithm)


class CriticConfig(Section):
    """Where the critic comes from and how it is trained; methods without a critic refuse this section."""

    init: str = Field(
        "auto",
        description="auto (the reward model if there is one, else the policy's trunk), shared (a head on the "
        "actor's own trunk), policy, or a folder",
    )
    value_clip: float | None = Field(0.2, gt=0, description="how far a value may move from its old one; null is off")
    vf_coef: float = Field(0.5, gt=0, description="weight of the value loss where the trunk is shared")
    warmup: int = Field(0, ge=0, description="first iterations in which only the critic learns")
    optimizer: OptimizerConfig = OptimizerConfig()


class OnPolicyRecipe(Section, Generic[A]):
    """Reinforcement learning of a language model from rewards."""

    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    rollout: RolloutConfig = RolloutConfig()
    algorithm: A = Field(default_factory=dict, description="the algorithm's own settings")  # type: ignore
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig | None = None
    reference: str = Field(
        "start", description="what KL is measured to: start (the policy before training), none, or a folder"
    )
    iterations: int = Field(100, ge=1, description="passes through the loop: rollout, reward, update")
    run: RunConfig = RunConfig()
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _fits(self) -> OnPolicyRecipe[A]:
        algorithm, rollout = self.algorithm, self.rollout
        samples = rollout.prompts * rollout.samples
        if algorithm.group and rollout.samples < 2:
            raise ValueError(
                f"{algorithm.title} compares the samples of one prompt, and rollout.samples is {rollout.samples}; "
                "give at least 2"
            )
        if self.critic is not None and not algorithm.critic:
            raise ValueError(f"{algorithm.title} has no critic; remove the section `critic`")
        if samples % algorithm.minibatches:
            raise ValueError(
                f"{samples} samples per iteration (rollout.prompts x rollout.samples) do not divide into "
                f"algorithm.minibatches = {algorithm.minibatches} equal parts"
            )
        truncated = rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_p > 0
        if truncated and algorithm.update == "trust_region":
            raise ValueError(
                f"{algorithm.title} measures KL over whole distributions; sample without top_k, top_p and min_p"
            )
        return self
