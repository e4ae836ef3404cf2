"""Which preference loss, its settings, and what is added to it."""

from __future__ import annotations

import difflib
import inspect
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from steersman.config.sections import Section
from steersman.loss.offline import LOSSES, OfflineLoss
from steersman.loss.preference import Explain, PairLogp, chosen_nll, desensitised

PairLossName = Literal[
    "dpo", "robust_dpo", "ipo", "hinge", "rso", "dpop", "tdpo1", "tdpo2", "simpo", "orpo", "cpo",
    "alphapo", "dpo_shift", "wpo", "cal_dpo", "sppo", "dpo_norm", "exo", "discopop", "fdpo_alpha", "fdpo_js", "nca",
    "bco_pair", "apo_zero", "apo_down", "aot", "aot_unpaired",
]  # fmt: skip


RANGES = {  # of the settings that leave a loss without meaning outside of them
    "beta": (lambda x: x > 0, "above 0"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "at least 0 and below 0.5"),
    "flip": (lambda x: 0 <= x < 0.5, "at least 0 and below 0.5"),
    "penalty": (lambda x: x >= 0, "at least 0"),
    "shift": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "epsilon": (lambda x: 0 < x < 0.5, "above 0 and below 0.5"),
    "tau": (lambda x: 0 < x < 1, "above 0 and below 1"),
    "fdpo_alpha.alpha": (lambda x: 0 <= x <= 1, "at least 0 and at most 1"),
}
"""By setting, or by loss and setting."""


class PairLossConfig(Section):
    """Which loss, with which of its own settings, and what is added to it."""

    name: PairLossName = Field(
        default="dpo", description="the loss; docs/algorithms.md lists all, and where each leads"
    )
    settings: dict[str, float] = Field(
        default_factory=dict, description="the loss's own numbers, such as {beta: 0.1, label_smoothing: 0.1}"
    )
    weight: float = Field(
        default=1.0, gt=0, description="weight of the loss itself, beside that of what is added to it"
    )
    also: dict[PairLossName, float] = Field(
        default_factory=dict,
        description="further losses (those of docs/algorithms.md), added with these weights, such as {bco_pair: "
        "0.25}; each takes those of `settings` that it has",
    )
    nll: float = Field(
        default=0.0, ge=0, description="weight of the chosen answers' mean negative log-likelihood, added to any loss"
    )
    gold_nll: float = Field(
        default=0.0,
        ge=0,
        description="weight of the mean negative log-likelihood of gold answers, the data's column gold, added to "
        "any loss (TPO: with cpo at settings {beta: 0.01, nll_weight: 0}, or simpo)",
    )
    explore: float = Field(
        default=0.0,
        ge=0,
        description="weight of the log-probability of the reference's answer of a pair, added to the loss, so that "
        "the policy goes where the reference does not (XPO's alpha); the data's chosen_from_reference says which "
        "answer that is",
    )
    soft_labels: bool = Field(
        default=True,
        description="train on a pair on which raters disagree in both directions, each weighted by its share of "
        "the votes",
    )
    margin_weight: float = Field(
        default=0.0,
        ge=0,
        description="the implicit reward of the chosen answer should lead by this times the data's margin",
    )
    ld_alpha: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="weight of an answer's tokens beyond the length of the other answer (LD-DPO); below 1 length "
        "counts for less, 1: all tokens alike",
    )

    @model_validator(mode="after")
    def _fits(self) -> PairLossConfig:
        self._mixture_fits()
        self._settings_fit()
        for name, entry in self.entries.items():
            if self.margin_weight and not entry.takes_offset:
                able = ", ".join(other for other, entry in LOSSES.items() if entry.takes_offset)
                raise ValueError(f"{name} has no place for margins; loss.margin_weight goes with {able}")
            means = name == "ipo" and self.settings.get("length_normalised")
            if self.ld_alpha != 1 and (means or not entry.takes_ld_alpha):
                able = ", ".join(other for other, entry in LOSSES.items() if entry.takes_ld_alpha)
                raise ValueError(
                    f"loss.ld_alpha weighs tokens in sums of log-probabilities, and {name} takes means of them, "
                    f"whole distributions or a likelihood; it goes with {able} (ipo without length_normalised)"
                )
        return self

    def _mixture_fits(self) -> None:
        if self.name in self.also:
            raise ValueError(f"loss.also: {self.name} is loss.name itself; give its weight as loss.weight")
        for name, weight in self.also.items():
            if weight <= 0:
                raise ValueError(f"loss.also: the weight of {name} is {weight}; it must be above 0")
        if self.weight != 1 and not (self.also or self.nll or self.gold_nll or self.explore):
            raise ValueError(
                "loss.weight weighs the loss beside what is added to it, and nothing is; remove it, or give "
                "loss.also, loss.nll, loss.gold_nll or loss.explore"
            )

    def _settings_fit(self) -> None:
        known = {name: _settings_of(entry) for name, entry in self.entries.items()}
        every = list(dict.fromkeys(key for keys in known.values() for key in keys))
        for key, value in self.settings.items():
            if key not in every:
                near = difflib.get_close_matches(key, every, 1)
                hint = f"; did you mean {near[0]}?" if near else "."
                raise ValueError(f"{' and '.join(known)} has no setting `{key}`{hint} It has: {', '.join(every)}")
            for name in (name for name in known if key in known[name]):
                fits, said = RANGES.get(f"{name}.{key}") or RANGES.get(key, (lambda _: True, ""))
                if not fits(value):
                    raise ValueError(f"{name}: {key} is {value}; it must be {said}")

    @property
    def entries(self) -> dict[str, OfflineLoss]:
        """Every loss of the mixture by its name, loss.name in front."""
        return {name: LOSSES[name] for name in (self.name, *self.also)}

    @property
    def needs_reference(self) -> bool:
        """Whether any of them measures how far answers move from a reference."""
        return any(entry.needs_reference for entry in self.entries.values())

    @property
    def needs_full_kl(self) -> bool:
        """Whether any of them takes the reference's whole distributions."""
        return any(entry.needs_full_kl for entry in self.entries.values())

    @property
    def needs_log_weight(self) -> bool:
        """Whether any of them weighs answers by how much they are like the policy's own."""
        return any(entry.needs_log_weight for entry in self.entries.values())

    @property
    def of_batch(self) -> bool:
        """Whether any of them is a loss of the whole batch's distributions."""
        return any(entry.of_batch for entry in self.entries.values())

    @property
    def leads_to(self) -> str:
        """Where the loss leads, or what a mixture lies between."""
        if not self.also:
            return LOSSES[self.name].fixed_point
        return f"between where {' and '.join(self.entries)} lead, by their weights; see docs/algorithms.md"

    def compared(self, pair: PairLogp) -> PairLogp:
        """The pair as the losses that compare its answers see it."""
        return pair if self.ld_alpha == 1 else desensitised(pair, self.ld_alpha)

    def of_pair(self, pair: PairLogp) -> tuple[Tensor, Explain]:
        """The weighed sum of the losses and the likelihood, `[B]`, and what `loss.name` has to tell."""
        compared = self.compared(pair)
        loss, explain = LOSSES[self.name].function(compared, **self._own_settings(self.name))
        loss = self.weight * loss
        for name, weight in self.also.items():
            loss = loss + weight * LOSSES[name].function(compared, **self._own_settings(name))[0]
        return loss + self.nll * chosen_nll(pair) if self.nll else loss, explain

    def _own_settings(self, name: str) -> dict[str, float]:
        known = _settings_of(LOSSES[name])
        return {key: value for key, value in self.settings.items() if key in known}


def _settings_of(entry: OfflineLoss) -> list[str]:
    """The names of a loss's own numbers: its function's keyword-only parameters."""
    parameters = inspect.signature(entry.function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
