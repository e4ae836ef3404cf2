"""`steersman sft`: supervised fine-tuning on text, prompt/completion or chat; pre-training of small models too."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.data import LargeDataConfig, Order, keys_of_other_kinds, layout, training
from steersman.distributed.parallel import ParallelConfig
from steersman.model import context_length
from steersman.objectives.supervised import SFT
from steersman.recipe.evaluation import EvaluationSection
from steersman.recipe.sections import ModelConfig, TrainingRecipe
from steersman.run.health.limits import HealthConfig
from steersman.run.preflight import Preflight
from steersman.run.run_config import ManyRunConfig
from steersman.train.offline import Offline, PackedOfflineConfig
from steersman.train.session import Session
from steersman.update.optimizer import OptimizerConfig
from steersman.verbs.offline_run import carry_out, policy_to_train
from steersman.verbs.preflight import describe_run


class SFTConfig(PackedOfflineConfig):
    """How long and in what batches to train on demonstrations, and on what loss."""

    loss: Literal["nll", "dft"] = Field(
        default="nll",
        description="nll: negative log-likelihood; dft: dynamic fine-tuning, the same with each token weighted by "
        "its probability, so that tokens that the model finds unlikely teach little and the model grows sharper "
        "(the best weights are then those with the highest mean probability of held-out tokens)",
    )


class SFTRecipe(TrainingRecipe):
    """Supervised fine-tuning: the loss is on completions (assistant turns of a chat), ends included."""

    model: ModelConfig
    data: LargeDataConfig
    train: SFTConfig = SFTConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationSection | None = Field(
        default=None, description="what else is measured of the policy at every evaluation, beside the loss"
    )
    run: ManyRunConfig = ManyRunConfig()
    parallel: ParallelConfig = ParallelConfig()
    health: HealthConfig = HealthConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return keys_of_other_kinds("demonstration")

    @model_validator(mode="after")
    def _ends(self) -> SFTRecipe:
        self.data.require_end(self.train.max_steps)
        self.train.require_kept(self.run)
        return self


def run(recipe: SFTRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Trains, and leaves the model in `<run folder>/model`; returns the summary that the run folder holds."""
    likelihood = recipe.train.loss == "nll"
    session = Session(
        "sft", recipe, resume=resume,
        metric="held_out/loss" if likelihood else "held_out/probability", mode="min" if likelihood else "max",
        headline=("loss", *(() if likelihood else ("probability",)), "held_out/loss", "throughput"),
        health=recipe.health,
    )  # fmt: skip
    with session:
        policy = policy_to_train(recipe, session.device)
        laid = layout(policy, recipe.data)
        order = Order(recipe.train.batch_size, recipe.run.seed)
        data = training(recipe.data, "demonstration", laid, context=context_length(policy.model), order=order)
        state = Offline(
            SFT(policy, data.train, data.held_out, recipe.run.micro_tokens, loss=recipe.train.loss),
            recipe.train, recipe.optimizer, recipe.run, shuffle=recipe.data.shuffle, data=data,
        )  # fmt: skip
        pre = Preflight("steersman sft")
        describe_run(pre, session, recipe.train.batch_size, state.total, data.summary)
        return carry_out(pre, session, state, recipe, policy, int(data.train.lengths.max()))
