"""`steersman kto` and `steersman bco`: offline optimisation on single answers with a thumb up or down.

`loss.name` of `kto` may also be `apo_zero_unpaired`. Pairs serve as well: the chosen answer is a thumb up, the
rejected one a thumb down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from pydantic import model_validator

from steersman.data import Order, keys_of_other_kinds, layout, training
from steersman.loss.offline import LOSSES
from steersman.model import context_length
from steersman.objectives.feedback import BCOConfig, FeedbackObjective, KTOConfig
from steersman.run.preflight import Preflight
from steersman.train.offline import WholeBatches
from steersman.train.reference_looks import reference_looks
from steersman.train.session import Session
from steersman.types import Stats
from steersman.verbs.offline_recipe import OfflineRecipe
from steersman.verbs.offline_run import carry_out, frozen_models, policy_to_train, read_or_follow, reference_of
from steersman.verbs.preflight import describe_run

L = TypeVar("L", KTOConfig, BCOConfig)


class FeedbackRecipe(OfflineRecipe[L], Generic[L]):
    """Offline optimisation on prompt, completion and label (or on pairs, split in two)."""

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return keys_of_other_kinds("feedback")

    @property
    def reads_reference_between_updates(self) -> bool:
        return super().reads_reference_between_updates or self.loss.mismatches

    @model_validator(mode="after")
    def _fits(self) -> FeedbackRecipe[L]:
        if self.loss.mismatches and self.train.batch_size < 2:
            raise ValueError(
                "train.batch_size is 1, but KTO estimates its reference point from the answers to the other prompts "
                "of a batch; give at least 2, better 16 or more"
            )
        if self.data.stream and self.loss.counts_labels:
            raise ValueError(
                "data.stream: how many thumbs are up is not known before; give loss.desirable_weight and "
                "loss.undesirable_weight as numbers (1 where both labels are about as many)"
            )
        return self


RECIPES = {"kto": FeedbackRecipe[KTOConfig], "bco": FeedbackRecipe[BCOConfig]}


class FeedbackRun(WholeBatches):
    """The offline loop with what a method measures over whole batches, which belongs to its state.

    Where liked and disliked answers differ in length, a batch of rows of like length would have one label only, and
    KTO's reference point would swing between the two.
    """

    objective: FeedbackObjective

    def step(self, rows: Sequence[int]) -> Stats:
        stats = super().step(rows)
        stats["threshold"] = self.objective.threshold
        self.objective.update_threshold(stats)
        return stats

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"objective": self.objective.state_dict()}

    def load_learned(self, state: dict[str, Any]) -> None:
        super().load_learned(state)
        self.objective.load_state_dict(state["objective"])


def run(recipe: FeedbackRecipe[Any], *, resume: bool = False) -> dict[str, Any]:
    """Trains, and leaves the model in `<run folder>/model`; returns the summary that the run folder holds."""
    name = recipe.loss.name
    session = Session(
        name, recipe, resume=resume, metric="held_out/auc",
        headline=("loss", "accuracy", "held_out/auc", "drift/liked"), health=recipe.health,
    )  # fmt: skip
    with session:
        policy = policy_to_train(recipe, session.device)
        laid = layout(policy, recipe.data)
        order = Order(recipe.train.batch_size, recipe.run.seed, by_length=FeedbackRun.by_length)
        data = training(recipe.data, "feedback", laid, context=context_length(policy.model), order=order)
        reference, looks = reference_of(recipe, policy), None
        frozen = frozen_models(recipe.reference_waits, reference=reference)
        if recipe.samples.count(True):
            looks = reference_looks(policy, reference, data.held_out or data.train, recipe.samples, session)
        objective = FeedbackObjective(
            policy, reference, data.train, data.held_out, recipe.loss, recipe.run.micro_tokens, looks
        )  # fmt: skip
        state = FeedbackRun(
            objective, recipe.train, recipe.optimizer, recipe.run, shuffle=recipe.data.shuffle, data=data
        )
        model = recipe.model.model_dump(mode="json")
        objective.readings.keep_in(session.path / "reference", reference=recipe.reference, model=model)
        pre = Preflight(f"steersman {name} ({LOSSES[name].source})")
        describe_run(pre, session, recipe.train.batch_size, state.total, data.summary)
        labels, where = data.train.values("label"), " in the first buffer" if recipe.data.stream else ""
        weights = "weights {:.3g} and {:.3g}".format(*objective.weights)
        pre.fact("labels", f"{labels.sum():,.0f} thumbs up, {(1 - labels).sum():,.0f} down{where}; {weights}")
        pre.fact("leads to", LOSSES[name].fixed_point)
        read_or_follow(pre, state, recipe, reference, read=objective.read_reference)
        sampled = None if looks is None else looks.sampled()
        return carry_out(pre, session, state, recipe, policy, int(data.train.lengths.max()), frozen, sampled)
