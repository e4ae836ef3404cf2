"""`steersman kto` and `steersman bco`: offline optimisation on single answers with a thumb up or down.

Pairs serve as well: the chosen answer is a thumb up, the rejected one a thumb down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from pydantic import model_validator

from steersman.data import Batches, EncodedSet, Feedback, describe, encode, feedback, layout, mixture
from steersman.loss.offline import LOSSES
from steersman.objectives.feedback import BCOConfig, FeedbackObjective, KTOConfig
from steersman.run.preflight import Preflight
from steersman.setup.models import context_length, policy_from
from steersman.setup.reference import reference_from
from steersman.train.held_prompts import held_prompts
from steersman.train.offline import Offline
from steersman.train.session import Session
from steersman.types import Stats, SteersmanError
from steersman.verbs.offline_recipe import OfflineRecipe
from steersman.verbs.offline_run import carry_out
from steersman.verbs.preflight import describe_run

L = TypeVar("L", KTOConfig, BCOConfig)


class FeedbackRecipe(OfflineRecipe[L], Generic[L]):
    """Offline optimisation on prompt, completion and label (or on pairs, split in two)."""

    @model_validator(mode="after")
    def _fits(self) -> FeedbackRecipe[L]:
        if self.loss.name == "kto" and self.train.batch_size < 2:
            raise ValueError(
                "train.batch_size is 1, but KTO estimates its reference point from the answers to the other prompts "
                "of a batch; give at least 2, better 16 or more"
            )
        return self


RECIPES = {"kto": FeedbackRecipe[KTOConfig], "bco": FeedbackRecipe[BCOConfig]}


class FeedbackRun(Offline):
    """The offline loop with what a method measures over whole batches, which belongs to its state.

    Batches are not made of rows of like length, as elsewhere: where liked and disliked answers differ in length,
    such a batch would have one label only, and KTO's reference point would swing between the two.
    """

    objective: FeedbackObjective

    def __init__(self, objective: FeedbackObjective, recipe: FeedbackRecipe[Any]) -> None:
        super().__init__(objective, recipe.train, recipe.optimizer, recipe.run)
        self.batches = Batches(
            len(objective.cost),
            recipe.train.batch_size,
            recipe.run.seed,
            shuffle=recipe.data.shuffle,
            mix=mixture(recipe.data, objective.train.parts),
        )

    def step(self, rows: Sequence[int]) -> Stats:
        self.objective.look(rows)
        stats = {"threshold": self.objective.threshold} | super().step(rows)
        self.objective.update_threshold(stats)
        return stats

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"objective": self.objective.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.objective.load_state_dict(state["objective"])


def run(recipe: FeedbackRecipe[Any], *, resume: bool = False) -> dict[str, Any]:
    """Trains, and leaves the model in `<run folder>/model`; returns the summary that the run folder holds."""
    name = recipe.loss.name
    session = Session(
        name, recipe, resume=resume, metric="held_out/auc",
        headline=("loss", "accuracy", "held_out/auc", "drift/liked"), health=recipe.health,
    )  # fmt: skip
    with session:
        policy = policy_from(recipe.model, recipe.run, session.device, pack=recipe.train.pack or None)
        laid = layout(policy, recipe.data)
        loaded = feedback(recipe.data)
        context = context_length(policy.model)
        train = encode(loaded.train, laid, recipe.data, context)
        _check_labels(train)
        held_out = encode(loaded.held_out, laid, recipe.data, context) if loaded.held_out else None
        reference, watch = reference_from(recipe.reference, recipe.model, recipe.run, policy), None
        if recipe.samples.count(True):
            watch = held_prompts(policy, reference, held_out or train, recipe.samples, session)
        objective = FeedbackObjective(
            policy, reference, train, held_out, recipe.loss, recipe.run.micro_tokens, watch
        )  # fmt: skip
        state = FeedbackRun(objective, recipe)
        pre = Preflight(f"steersman {name} ({LOSSES[name].source})")
        describe_run(pre, session, recipe.train.batch_size, state.total, describe(loaded, train, laid))
        ups = sum(e.label for e in train.examples)
        weights = "weights {:.3g} and {:.3g}".format(*objective.weights)
        pre.fact("labels", f"{ups:,} thumbs up, {len(train.examples) - ups:,} down; {weights}")
        pre.fact("leads to", LOSSES[name].fixed_point)
        sampled = None if watch is None else watch.sampled()
        return carry_out(pre, session, state, recipe, policy, max(train.lengths), reference, sampled)


def _check_labels(data: EncodedSet[Feedback]) -> None:
    """Once more after encoding: what was too long may have been all of one kind."""
    ups = sum(e.label for e in data.examples)
    if ups in (0, len(data.examples)):
        kind = "up" if ups else "down"
        raise SteersmanError(
            f"all {len(data.examples)} answers that fit have thumbs {kind}, and {data.dropped} were too long; thumbs "
            "up and down are both needed (data.max_length, data.on_too_long)"
        )
