"""Preference losses over pairs of answers, as an objective.

The reference's log-probabilities of answers that are in memory are computed once, before the first step, and kept
there (a resumed run computes them again: one forward over the data). Of a set that is read while training they are
computed batch by batch, as the token-level methods do everywhere, which need whole distributions.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from steersman.config.sections import Section
from steersman.data import (
    EncodedSet,
    Preference,
    TrainingSet,
    collate_pairs,
)
from steersman.distributed.micro import my_micro_batches
from steersman.loss.offline import LOSSES
from steersman.loss.preference import Explain, PairLogp, chosen_nll, pair_logp, soft_labelled
from steersman.model import Policy
from steersman.model.layout import response_slots, spread
from steersman.objectives.batch import right, rounding, weight_of
from steersman.run.progress import with_progress
from steersman.setup.reference import Readings, Reference, answer_logp_now, collision, divergence
from steersman.train.held_prompts import HeldPrompts
from steersman.train.tally import Tally
from steersman.types import Stats, Tokens, send

PairLossName = Literal[
    "dpo", "robust_dpo", "ipo", "hinge", "rso", "dpop", "tdpo1", "tdpo2", "simpo", "orpo", "cpo",
    "alphapo", "dpo_shift", "wpo", "cal_dpo", "sppo", "dpo_norm", "exo", "discopop", "fdpo_alpha", "fdpo_js", "nca",
    "apo_zero", "apo_down",
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
    """Which loss, with which of its own settings."""

    name: PairLossName = Field(default="dpo", description="the loss; see docs/algorithms.md for where each leads")
    settings: dict[str, float] = Field(
        default_factory=dict, description="the loss's own numbers, such as {beta: 0.1, label_smoothing: 0.1}"
    )
    nll: float = Field(
        default=0.0, ge=0, description="weight of the chosen answers' mean negative log-likelihood, added to any loss"
    )
    soft_labels: bool = Field(
        default=True, description="count a pair on which raters disagree both ways, each in proportion to its votes"
    )
    margin_weight: float = Field(
        default=0.0, ge=0, description="times the data's margin: by how much the implicit reward should lead"
    )

    @model_validator(mode="after")
    def _of_reference(self) -> PairLossConfig:
        known = [
            p.name
            for p in inspect.signature(LOSSES[self.name].function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        if self.margin_weight and not LOSSES[self.name].takes_offset:
            able = ", ".join(name for name, entry in LOSSES.items() if entry.takes_offset)
            raise ValueError(f"{self.name} has no place for margins; loss.margin_weight goes with {able}")
        for key, value in self.settings.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]}?" if near else "."
                raise ValueError(f"{self.name} has no setting `{key}`{hint} It has: {', '.join(known)}")
            fits, said = RANGES.get(f"{self.name}.{key}") or RANGES.get(key, (lambda _: True, ""))
            if not fits(value):
                raise ValueError(f"{self.name}: {key} is {value}; it must be {said}")
        return self


class PairObjective:
    """The objective: the mean of a pair loss, both answers in one forward.

    `watch` answers held prompts at every look at held-out data. With an `anchor`, a second frozen policy and its
    share, the reference is the geometric mixture of both: log pi_ref = (1 - share) log reference + share log anchor,
    up to a number per prompt, which no pair feels.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        train: TrainingSet[Preference],
        held_out: EncodedSet[Preference] | None,
        config: PairLossConfig,
        micro_tokens: int,
        watch: HeldPrompts | None = None,
        anchor: tuple[Reference, float] | None = None,
    ) -> None:
        self.module, self.reference, self.train, self.held_out = policy, reference, train, held_out
        self.config, self.entry, self.micro_tokens, self.watch = config, LOSSES[config.name], micro_tokens, watch
        references: list[tuple[Reference, float]] = []
        if self.entry.needs_reference and not self.entry.needs_full_kl:
            assert reference is not None
            share = 0.0 if anchor is None else anchor[1]
            references = [(reference, 1 - share), *([] if anchor is None else [anchor])]
        self.readings = Readings(references, micro_tokens)
        self.reference_logp: dict[int, Tensor] = {}

    @property
    def cost(self) -> np.ndarray:
        """Tokens of each pair; of a stream, of those in its buffer."""
        return 2 * self.train.lengths

    def read_reference(self, rows: Sequence[int]) -> None:
        """Reads what the reference says of the training pairs `rows` and of the held-out ones, before the first
        `loss` or `evaluate`; of pairs that are streamed it is read batch by batch."""
        if self.readings.models:
            self.reference_logp = self.readings.of_data(self.train, self.held_out, rows)

    def denominator(self, rows: Sequence[int]) -> float:
        return weight_of(self.train.examples, rows)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        pair, loss, explain = self._run(self.train, rows)
        weights = torch.tensor([self.train.examples[i].weight for i in rows], dtype=loss.dtype)
        weight = send(weights, loss.device)
        tally.add("loss", (weight * loss).sum(), float(weights.sum()))
        for name, value in _told(pair, explain).items():
            tally.add(name, value.sum(), len(rows))
        return (weight * loss).sum() / denominator

    @torch.no_grad()
    def evaluate(self) -> Stats:
        """The same numbers on held-out pairs, and what the policy says to held prompts."""
        told = {} if self.watch is None else self.watch.look()
        if self.held_out is None:
            return told
        tally, cost = Tally(), torch.tensor(2 * self.held_out.lengths)
        for part in with_progress(my_micro_batches(cost, self.micro_tokens), "look at held-out pairs"):
            pair, loss, explain = self._run(self.held_out, part.rows.tolist())
            for name, value in {"loss": loss, **_told(pair, explain)}.items() if part.counts else ():
                tally.add(f"held_out/{name}", value.sum(), len(part.rows))
        return told | tally.means()

    def _run(self, data: TrainingSet[Preference], rows: Sequence[int]) -> tuple[PairLogp, Tensor, Explain]:
        tokens = collate_pairs([data.groups[i] for i in rows])
        mask, n = send(tokens.mask, self.module.device), len(rows)
        sums = self._reference(data, rows, tokens)
        hidden = self.module.hidden(tokens)
        logp = self.module.logp_from(tokens, hidden).logp
        ref = kl = None
        if self.entry.needs_full_kl:
            ref, kl = self._divergence(tokens, hidden)
        own = self._own(tokens, hidden, logp) if self.entry.needs_log_weight else None
        pair = pair_logp(
            logp[:n], mask[:n], logp[n:], mask[n:],
            chosen_log_weight=None if own is None else own[:n], rejected_log_weight=None if own is None else own[n:],
            ref_chosen=None if ref is None else ref[:n], ref_rejected=None if ref is None else ref[n:],
            chosen_kl=None if kl is None else kl[:n], rejected_kl=None if kl is None else kl[n:],
        )  # fmt: skip
        if sums is not None:
            sums = send(sums, logp.device)
            pair = pair._replace(ref_chosen=sums[:, 0], ref_rejected=sums[:, 1])
        examples = [data.examples[i] for i in rows]
        if self.config.margin_weight:
            lead = torch.tensor([e.margin or 0.0 for e in examples], dtype=logp.dtype)
            pair = pair._replace(offset=send(self.config.margin_weight * lead, logp.device))
        agreement = torch.tensor(
            [e.agreement if self.config.soft_labels else 1.0 for e in examples], dtype=logp.dtype
        )
        return pair, *soft_labelled(self._one_way, pair, agreement)

    def _reference(self, data: TrainingSet[Preference], rows: Sequence[int], tokens: Tokens) -> Tensor | None:
        """The reference's log-probabilities of both answers, `[B, 2]`; None for a loss that takes none of whole
        answers."""
        if not self.readings.models:
            return None
        if data.in_memory:
            return self.reference_logp[id(data)][list(rows)]
        return answer_logp_now(self.readings.models, tokens).view(2, -1).T

    def _one_way(self, pair: PairLogp) -> tuple[Tensor, Explain]:
        loss, explain = self.entry.function(pair, **self.config.settings)
        return loss + self.config.nll * chosen_nll(pair) if self.config.nll else loss, explain

    @torch.no_grad()
    def _own(self, tokens: Tokens, hidden: Tensor, logp: Tensor) -> Tensor:
        """log pi(y_t) - log sum_v pi(v | s_t)^2 at every response token, `[2B, T]`."""
        return logp - spread(collision(hidden, self.module.head()).to(logp), response_slots(tokens))

    def _divergence(self, tokens: Tokens, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities and KL(pi_ref || pi) at every response token, `[2B, T]`."""
        assert self.reference is not None
        with torch.no_grad():
            hidden_ref = self.reference.hidden(tokens)
            ref = self.reference.logp_from(tokens, hidden_ref).logp
        per_token = divergence(hidden_ref, self.reference.head(), hidden, self.module.head())
        return ref, spread(per_token.to(ref), response_slots(tokens))


def _told(pair: PairLogp, explain: Explain) -> dict[str, Tensor]:
    """What explains a preference loss: both likelihoods apart, how far they moved, the implicit reward's margin."""
    told = {
        "accuracy": right(explain["margin"], tie=rounding(pair.chosen.detach())),
        "margin": explain["margin"],
        "logp/chosen": pair.chosen.detach(),
        "logp/rejected": pair.rejected.detach(),
    }
    if pair.ref_chosen is not None and pair.ref_rejected is not None:
        told["drift/chosen"] = pair.chosen.detach() - pair.ref_chosen
        told["drift/rejected"] = pair.rejected.detach() - pair.ref_rejected
    return told
