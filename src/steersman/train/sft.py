"""`steersman sft`: supervised fine-tuning on text, prompt/completion or chat; pre-training of small models too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from steersman.data import DataConfig, Encoded, collate, demonstrations, describe, encode, layout
from steersman.loss.reduce import reduce, token_weight
from steersman.loss.supervised import nll
from steersman.model import Policy
from steersman.ops.masked import masked_sum
from steersman.run.config import Section
from steersman.run.health_limits import HealthConfig
from steersman.run.preflight import Preflight
from steersman.train.carry_out import carry_out
from steersman.train.models import context_length, policy_from
from steersman.train.offline import Offline, OfflineConfig
from steersman.train.preflight import describe_run
from steersman.train.progress import reported
from steersman.train.sections import ModelConfig, RunConfig
from steersman.train.session import Session
from steersman.train.tally import Tally
from steersman.types import Stats
from steersman.update.micro import micro_batches
from steersman.update.optimizer import OptimizerConfig


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
    run: RunConfig = RunConfig()
    health: HealthConfig = HealthConfig()


class SFT:
    """The objective: mean negative log-likelihood per token that counts, in nats."""

    def __init__(self, policy: Policy, train: Sequence[Encoded], held_out: Sequence[Encoded], micro_tokens: int):
        self.module, self.train, self.held_out, self.micro_tokens = policy, train, held_out, micro_tokens
        self.cost = [len(e) for e in train]

    def denominator(self, rows: Sequence[int]) -> float:
        return max(sum(sum(self.train[i].mask) for i in rows), 1)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        tokens = collate([self.train[i] for i in rows]).to(self.module.device)
        per_token = nll(self.module.logp(tokens).logp)
        loss = reduce(per_token, token_weight(tokens.mask, "token", dtype=per_token.dtype), denominator)
        tally.add("loss", loss * denominator, int(tokens.mask.sum()))
        return loss

    @torch.no_grad()
    def evaluate(self) -> Stats:
        """Held-out loss in nats per token, its exponential, and the loss of the end tokens alone."""
        if not self.held_out:
            return {}
        total, end_total, count = 0.0, 0.0, 0
        lengths = torch.tensor([len(e) for e in self.held_out])
        for rows in reported(micro_batches(lengths, self.micro_tokens), "look at held-out rows"):
            tokens = collate([self.held_out[i] for i in rows.tolist()]).to(self.module.device)
            loss = nll(self.module.logp(tokens).logp)
            total += float(masked_sum(loss, tokens.mask))
            last = (tokens.response_length - 1).clamp(min=0)
            end_total += float(loss.gather(1, last[:, None]).sum())
            count += int(tokens.mask.sum())
        mean = total / max(count, 1)
        return {
            "held_out/loss": mean,
            "held_out/perplexity": math.exp(min(mean, 50)),
            "held_out/loss_last_token": end_total / len(self.held_out),
        }


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
        )  # fmt: skip
        pre = Preflight("steersman sft")
        describe_run(pre, session, recipe.train.batch_size, state.total, describe(loaded, train, laid))
        return carry_out(pre, session, state, recipe, policy, max(train.lengths))
