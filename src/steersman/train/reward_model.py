"""`steersman reward`: a reward model from preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from steersman.data import DataConfig, EncodedSet, Preference, collate_pairs, describe, encode, layout, preferences
from steersman.loss.reward import centring, pairwise
from steersman.model import ScalarModel
from steersman.run.config import Section
from steersman.run.health import HealthConfig
from steersman.run.preflight import Preflight
from steersman.train.models import context_length, save_model, scalar_from
from steersman.train.offline import Offline, OfflineConfig, restore_best
from steersman.train.preflight import describe_run, scalar_role
from steersman.train.sections import ModelConfig, RunConfig
from steersman.train.session import Session
from steersman.train.tally import Tally
from steersman.types import Stats
from steersman.update.micro import micro_batches
from steersman.update.optimizer import OptimizerConfig


class RewardModelConfig(OfflineConfig):
    """How long and in what batches to train, and what the loss is made of."""

    use_margin: bool = Field(default=True, description="use the data's margins, where it has them")
    centre: float = Field(
        default=0.0, ge=0, description="weight of (r_chosen + r_rejected)^2, which keeps scores around 0"
    )
    keep: Literal["last", "best"] = Field(
        default="best", description="which weights the saved model has: the last, or the best on held-out data"
    )


class RewardModelRecipe(Section):
    """A Bradley-Terry reward model: -log sigmoid(r_chosen - r_rejected), from a base, SFT or reward model."""

    model: ModelConfig
    data: DataConfig
    train: RewardModelConfig = RewardModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)
    run: RunConfig = RunConfig()
    health: HealthConfig = HealthConfig()


class PairwiseReward:
    """The objective: mean Bradley-Terry loss per pair, both answers in one forward."""

    def __init__(
        self,
        model: ScalarModel,
        train: EncodedSet[Preference],
        held_out: EncodedSet[Preference] | None,
        config: RewardModelConfig,
        micro_tokens: int,
    ) -> None:
        self.module, self.train, self.held_out, self.config, self.micro = model, train, held_out, config, micro_tokens
        self.cost = [2 * length for length in train.lengths]

    def denominator(self, rows: Sequence[int]) -> float:
        return sum(self.train.examples[i].weight for i in rows)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        chosen, rejected = self._scores(self.train, rows)
        examples = [self.train.examples[i] for i in rows]
        margin = [e.margin or 0.0 if self.config.use_margin else 0.0 for e in examples]
        target = chosen.new_tensor([e.agreement for e in examples])
        weight = chosen.new_tensor([e.weight for e in examples])
        per_pair = pairwise(chosen, rejected, target=target, margin=chosen.new_tensor(margin))
        per_pair = per_pair + self.config.centre * centring(chosen, rejected)
        tally.add("loss", (weight * per_pair).sum(), float(weight.sum()))
        tally.add("accuracy", (chosen > rejected).float().sum(), len(rows))
        tally.add("margin", (chosen - rejected).sum(), len(rows))
        return (weight * per_pair).sum() / denominator

    @torch.no_grad()
    def evaluate(self) -> Stats:
        """Held-out loss and accuracy, and how well the trivial rule "the longer answer wins" does beside it."""
        held = self.held_out
        if held is None:
            return {}
        chosen, rejected = torch.zeros(len(held.groups)), torch.zeros(len(held.groups))
        cost = torch.tensor([2 * length for length in held.lengths])
        for rows in micro_batches(cost, self.micro):
            a, b = self._scores(held, rows.tolist())
            chosen[rows], rejected[rows] = a.float().cpu(), b.float().cpu()
        lengths = torch.tensor([[len(g[0].response), len(g[1].response)] for g in held.groups]).float()
        return {
            "held_out/loss": float(pairwise(chosen, rejected).mean()),
            "held_out/accuracy": agreement(chosen - rejected),
            "held_out/accuracy_longer_wins": agreement(lengths[:, 0] - lengths[:, 1]),
            "held_out/margin": float((chosen - rejected).mean()),
            "held_out/score_mean": float(torch.cat([chosen, rejected]).mean()),
            "held_out/score_std": float(torch.cat([chosen, rejected]).std()),
        }

    def _scores(self, data: EncodedSet[Preference], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        tokens = collate_pairs([data.groups[i] for i in rows]).to(self.module.device)
        chosen, rejected = self.module.score(tokens).chunk(2)
        return chosen, rejected


def agreement(lead: Tensor) -> float:
    """Share of pairs with a positive lead; a lead of 0 counts half."""
    return float(((lead > 0).float() + 0.5 * (lead == 0).float()).mean())


def run(recipe: RewardModelRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Trains, and leaves the model in `<run folder>/model`; returns the summary that the run folder holds."""
    session = Session(
        "reward", recipe, resume=resume, metric="held_out/accuracy",
        shown=("loss", "accuracy", "held_out/accuracy"), health=recipe.health,
    )  # fmt: skip
    with session:
        model = scalar_from(recipe.model, recipe.run, session.device)
        laid = layout(model.tokenizer, recipe.data)
        loaded = preferences(recipe.data)
        context = context_length(model.model)
        train = encode(loaded.train, laid, recipe.data, context)
        held_out = encode(loaded.held_out, laid, recipe.data, context) if loaded.held_out else None
        objective = PairwiseReward(model, train, held_out, recipe.train, recipe.run.micro_tokens)
        state = Offline(objective, recipe.train, recipe.optimizer, recipe.run, shuffle=recipe.data.shuffle)
        pre = Preflight("steersman reward")
        describe_run(pre, session, recipe.train.batch_size, state.total, describe(loaded, train, laid))
        pre.role(scalar_role("reward model", model, recipe.model.path, recipe.run.micro_tokens, max(train.lengths)))
        pre.check()
        pre.show()
        state.run(session)
        if session.stopped:
            return session.summary({})
        if recipe.train.keep == "best":
            restore_best(session, state)
        save_model(model, recipe.model, session.path / "model")
        return session.summary({"model": str(session.path / "model"), **objective.evaluate()})
