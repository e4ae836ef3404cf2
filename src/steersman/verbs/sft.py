"""`steersman sft`: supervised fine-tuning on text, prompt/completion or chat; pre-training of small models too."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from steersman.data import DataConfig, demonstrations, describe, encode, layout, mixture
from steersman.objectives.supervised import SFT
from steersman.run.config import Section
from steersman.run.health_limits import HealthConfig
from steersman.run.parallel import ParallelConfig
from steersman.run.preflight import Preflight
from steersman.train.models import context_length, policy_from
from steersman.train.offline import Offline, OfflineConfig
from steersman.train.sections import ManyRunConfig, ModelConfig
from steersman.train.session import Session
from steersman.update.optimizer import OptimizerConfig
from steersman.verbs.offline_run import carry_out
from steersman.verbs.preflight import describe_run


class SFTConfig(OfflineConfig):
    """How long and in what batches to train on demonstrations."""

    pack: int = Field(
        default=0,
        ge=0,
        description="put several examples into rows of so many tokens, kept apart by position; 0 is off",
    )


class SFTRecipe(Section):
    """Supervised fine-tuning: the loss is on completions (assistant turns of a chat), ends included."""

    model: ModelConfig
    data: DataConfig
    train: SFTConfig = SFTConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: ManyRunConfig = ManyRunConfig()
    parallel: ParallelConfig = ParallelConfig()
    health: HealthConfig = HealthConfig()


def run(recipe: SFTRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Trains, and leaves the model in `<run folder>/model`; returns the summary that the run folder holds."""
    session = Session(
        "sft", recipe, resume=resume, metric="held_out/loss", mode="min",
        shown=("loss", "held_out/loss", "throughput"), health=recipe.health,
    )  # fmt: skip
    with session:
        policy = policy_from(recipe.model, recipe.run, session.device, pack=recipe.train.pack or None)
        laid = layout(policy, recipe.data)
        loaded = demonstrations(recipe.data)
        context = context_length(policy.model)
        train = encode(loaded.train, laid, recipe.data, context)
        held_out = encode(loaded.held_out, laid, recipe.data, context).first if loaded.held_out else []
        state = Offline(
            SFT(policy, train.first, held_out, recipe.run.micro_tokens),
            recipe.train, recipe.optimizer, recipe.run, shuffle=recipe.data.shuffle,
            mix=mixture(recipe.data, train.rows),
        )  # fmt: skip
        pre = Preflight("steersman sft")
        describe_run(pre, session, recipe.train.batch_size, state.total, describe(loaded, train, laid))
        return carry_out(pre, session, state, recipe, policy, max(train.lengths))
