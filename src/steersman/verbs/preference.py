"""`steersman dpo` and its relatives: offline preference optimisation on pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, model_validator

from steersman.data import Order, Preference, TrainingSet, keys_of_other_kinds, layout, training
from steersman.loss.offline import LOSSES
from steersman.model import context_length
from steersman.objectives.preference import PairObjective
from steersman.objectives.preference_config import PairLossConfig
from steersman.run.preflight import Preflight
from steersman.setup.reference import reference_from
from steersman.train.offline import Offline, WholeBatches
from steersman.train.reference_looks import reference_looks
from steersman.train.session import Session
from steersman.types import SteersmanError
from steersman.verbs.offline_recipe import OfflineRecipe
from steersman.verbs.offline_run import carry_out, frozen_models, policy_to_train, read_or_follow, reference_of
from steersman.verbs.preflight import describe_run

ANCHOR_SHARE = 0.1
"""An anchor's share of the mixture where a recipe gives none."""


class PreferenceRecipe(OfflineRecipe[PairLossConfig]):
    """Offline preference optimisation on prompt, chosen and rejected."""

    anchor: str | None = Field(
        default=None, description="folder of a second reference; the reference is then a geometric mixture of both"
    )
    anchor_share: float = Field(default=ANCHOR_SHARE, ge=0, le=1, description="the anchor's share of that mixture")

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return keys_of_other_kinds("preference")

    @property
    def separate_reference(self) -> bool:
        return (self.reads_reference and super().separate_reference) or self.anchor is not None

    @property
    def reads_reference(self) -> bool:
        """Whether the loss has a reference, or the held prompts of `samples` measure their KL to it."""
        return self.loss.needs_reference or self.reads_reference_between_updates

    @property
    def reads_reference_between_updates(self) -> bool:
        return self.samples.count(self.loss.needs_reference) > 0

    @property
    def reads_reference_in_updates(self) -> bool:
        return super().reads_reference_in_updates or self.loss.needs_full_kl

    @model_validator(mode="after")
    def _references_fit(self) -> PreferenceRecipe:
        more = [name for name, entry in self.loss.entries.items() if not entry.only_differences]
        if self.anchor is not None and more:
            able = ", ".join(name for name, entry in LOSSES.items() if entry.only_differences)
            raise ValueError(
                f"anchor: the mixture of two references is known up to a number per prompt, and {' and '.join(more)} "
                f"takes more of a reference than differences between whole answers; use one of {able}"
            )
        if self.anchor is not None and self.loss.settings.get("length_normalised"):
            raise ValueError(
                "anchor: the mixture of two references is known up to a number per prompt, which does not drop out "
                "with length_normalised; remove one of the two"
            )
        if self.anchor is not None and self.loss.ld_alpha != 1:
            raise ValueError(
                "anchor: the mixture of two references is known of whole answers alone, and loss.ld_alpha takes "
                "parts of them; remove one of the two"
            )
        if self.loss.of_batch and self.train.batch_size < 2:
            named = " and ".join(name for name, entry in self.loss.entries.items() if entry.of_batch)
            raise ValueError(
                f"train.batch_size is 1, but {named} compares the distributions of a batch's answers; give at least "
                "2, better 16 or more"
            )
        if self.moving_reference is not None and not self.loss.needs_reference:
            raise ValueError(
                f"moving_reference: {' and '.join(self.loss.entries)} has no reference; remove it, or choose a loss "
                "with one, such as dpo"
            )
        if self.moving_reference is not None and self.anchor is not None:
            raise ValueError(
                "moving_reference: a mixture with an anchor does not move; remove moving_reference, or anchor"
            )
        if self.anchor is None and self.anchor_share != ANCHOR_SHARE:
            raise ValueError("anchor_share is the share of an anchor, and none is given; give anchor, or remove it")
        if self.reference != "start" and not self.reads_reference:
            raise ValueError(
                f"reference: {' and '.join(self.loss.entries)} has none, so the model in {self.reference} is never "
                "read; remove it, or give samples.prompts, whose KL is measured to it"
            )
        return self


def run(recipe: PreferenceRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Trains, and leaves the model in `<run folder>/model`; returns the summary that the run folder holds."""
    session = Session(
        recipe.loss.name, recipe, resume=resume, metric="held_out/accuracy",
        headline=("loss", "accuracy", "margin", "held_out/accuracy", "held_out/margin", "drift/chosen"),
        health=recipe.health,
    )  # fmt: skip
    with session:
        policy = policy_to_train(recipe, session.device)
        laid = layout(policy, recipe.data)
        loop = WholeBatches if recipe.loss.of_batch else Offline
        order = Order(recipe.train.batch_size, recipe.run.seed, by_length=loop.by_length)
        kind = "triple" if recipe.loss.gold_nll else "preference"
        data = training(recipe.data, kind, laid, context=context_length(policy.model), order=order)
        _check_margins(recipe.loss, data.train)
        _check_explored(recipe.loss, data.train)
        reference = looks = anchor = None
        if recipe.reads_reference:
            reference = reference_of(recipe, policy)
        if recipe.anchor is not None:
            second = reference_from(recipe.anchor, recipe.model.model_copy(update={"lora": None}), recipe.run, policy)
            anchor = (second, recipe.anchor_share)
        frozen = frozen_models(
            recipe.reference_waits, reference=reference, anchor=None if anchor is None else anchor[0]
        )
        if reference is not None and recipe.reads_reference_between_updates:
            looks = reference_looks(policy, reference, data.held_out or data.train, recipe.samples, session)
        objective = PairObjective(
            policy, reference, data.train, data.held_out, recipe.loss, recipe.run.micro_tokens, looks, anchor
        )
        state = loop(
            objective, recipe.train, recipe.optimizer, recipe.run,
            shuffle=recipe.data.shuffle, data=data,
        )  # fmt: skip
        objective.readings.keep_in(
            session.path / "reference", reference=recipe.reference, anchor=recipe.anchor, share=recipe.anchor_share,
            model=recipe.model.model_dump(mode="json"),
        )  # fmt: skip
        sources = dict.fromkeys(entry.source for entry in recipe.loss.entries.values())
        pre = Preflight(f"steersman {' + '.join(recipe.loss.entries)} ({', '.join(sources)})")
        describe_run(pre, session, recipe.train.batch_size, state.total, data.summary)
        pre.fact("leads to", recipe.loss.leads_to)
        read_or_follow(pre, state, recipe, reference, read=objective.read_reference)
        sampled = None if looks is None else looks.sampled()
        return carry_out(pre, session, state, recipe, policy, int(data.train.lengths.max()), frozen, sampled)


def _check_margins(config: PairLossConfig, data: TrainingSet[Preference]) -> None:
    if config.margin_weight and not np.nan_to_num(data.values("margin")).any():
        raise SteersmanError(
            f"loss.margin_weight is {config.margin_weight:g}, but no pair has a margin; give the data a column "
            "`margin` (data.columns can name yours) or leave loss.margin_weight out"
        )


def _check_explored(config: PairLossConfig, data: TrainingSet[Preference]) -> None:
    if config.explore and np.isnan(data.values("chosen_from_reference")).all():
        raise SteersmanError(
            f"loss.explore is {config.explore:g}, but no pair says which answer is the reference's; give the data a "
            "column `chosen_from_reference` (data.columns can name yours), or leave loss.explore out"
        )
