"""`steersman dpo` and its relatives: offline preference optimisation on pairs.

The reference's log-probabilities of the given answers are computed once, before the first step, and kept; only
the token-level methods, which need whole distributions, run the reference in every step.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steersman.data import DataConfig, EncodedSet, Preference, collate_pairs, describe, encode, layout, preferences
from steersman.loss.offline import LOSSES
from steersman.loss.preference import PairLogp, chosen_nll, pair_logp
from steersman.model import Policy
from steersman.ops.logprob import Head
from steersman.run.config import Section
from steersman.run.health import HealthConfig
from steersman.run.preflight import Preflight
from steersman.train.models import context_length, policy_from
from steersman.train.offline import Offline, OfflineConfig
from steersman.train.preflight import describe_run, policy_role
from steersman.train.sections import ModelConfig, RunConfig
from steersman.train.session import Session
from steersman.train.sft import finish
from steersman.train.tally import Tally
from steersman.types import Stats, Tokens
from steersman.update.micro import micro_batches
from steersman.update.optimizer import OptimizerConfig

PairLossName = Literal[
    "dpo", "robust_dpo", "ipo", "hinge", "dpop", "tdpo1", "tdpo2", "simpo", "orpo", "cpo"
]  # fmt: skip


class PairLossConfig(Section):
    """Which loss, with which of its own settings."""

    name: PairLossName = Field(default="dpo", description="the loss; see docs/algorithms.md for where each leads")
    settings: dict[str, float] = Field(
        default_factory=dict, description="the loss's own numbers, such as {beta: 0.1, label_smoothing: 0.1}"
    )
    nll: float = Field(
        default=0.0, ge=0, description="weight of the chosen answers' mean negative log-likelihood, added to any loss"
    )

    @model_validator(mode="after")
    def _known(self) -> PairLossConfig:
        known = [
            p.name
            for p in inspect.signature(LOSSES[self.name].function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        for key in self.settings:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"{self.name} has no setting `{key}`{hint} It has: {', '.join(known)}")
        return self


class PreferenceRecipe(Section):
    """Offline preference optimisation on prompt, chosen and rejected."""

    model: ModelConfig
    data: DataConfig
    loss: PairLossConfig = PairLossConfig()
    train: OfflineConfig = OfflineConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, warmup=0.1, schedule="linear")
    reference: str = Field(default="start", description="start (the policy before training) or a folder")
    run: RunConfig = RunConfig()
    health: HealthConfig = HealthConfig()


class PairObjective:
    """The objective: the mean of a pair loss, both answers in one forward."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        train: EncodedSet[Preference],
        held_out: EncodedSet[Preference] | None,
        config: PairLossConfig,
        micro_tokens: int,
    ) -> None:
        self.module, self.reference, self.train, self.held_out = policy, reference, train, held_out
        self.config, self.entry, self.micro_tokens = config, LOSSES[config.name], micro_tokens
        self.cost = [2 * length for length in train.lengths]
        self.known: dict[int, Tensor] = {}
        if reference is not None and not self.entry.needs_full_kl:
            for data in filter(None, (train, held_out)):
                self.known[id(data)] = self._reference_sums(data)

    def denominator(self, rows: Sequence[int]) -> float:
        return sum(self.train.examples[i].weight for i in rows)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        pair, loss, explain = self._run(self.train, rows)
        weight = loss.new_tensor([self.train.examples[i].weight for i in rows])
        tally.add("loss", (weight * loss).sum(), float(weight.sum()))
        for name, value in _told(pair, explain).items():
            tally.add(name, value.sum(), len(rows))
        return (weight * loss).sum() / denominator

    @torch.no_grad()
    def evaluate(self) -> Stats:
        """The same numbers on held-out pairs."""
        if self.held_out is None:
            return {}
        tally, cost = Tally(), torch.tensor([2 * length for length in self.held_out.lengths])
        for rows in micro_batches(cost, self.micro_tokens):
            pair, loss, explain = self._run(self.held_out, rows.tolist())
            for name, value in {"loss": loss, **_told(pair, explain)}.items():
                tally.add(f"held_out/{name}", value.sum(), len(rows))
        return tally.means()

    def _run(self, data: EncodedSet[Preference], rows: Sequence[int]) -> tuple[PairLogp, Tensor, dict[str, Tensor]]:
        tokens = collate_pairs([data.groups[i] for i in rows]).to(self.module.device)
        n = len(rows)
        hidden = self.module.hidden(tokens)
        logp = self.module.logp_from(tokens, hidden).logp
        ref = kl = None
        if self.entry.needs_full_kl:
            ref, kl = self._divergence(tokens, hidden)
        pair = pair_logp(
            logp[:n], tokens.mask[:n], logp[n:], tokens.mask[n:],
            ref_chosen=None if ref is None else ref[:n], ref_rejected=None if ref is None else ref[n:],
            chosen_kl=None if kl is None else kl[:n], rejected_kl=None if kl is None else kl[n:],
        )  # fmt: skip
        if id(data) in self.known:
            sums = self.known[id(data)][list(rows)].to(logp.device)
            pair = pair._replace(ref_chosen=sums[:, 0], ref_rejected=sums[:, 1])
        loss, explain = self.entry.function(pair, **self.config.settings)
        if self.config.nll:
            loss = loss + self.config.nll * chosen_nll(pair)
        return pair, loss, explain

    def _divergence(self, tokens: Tokens, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities and KL(pi_ref || pi) at every response token, `[2B, T]`."""
        assert self.reference is not None
        with torch.no_grad():
            hidden_ref = self.reference.hidden(tokens)
            ref = self.reference.logp_from(tokens, hidden_ref).logp
        per_token = divergence_from(hidden_ref, self.reference.head(), hidden, self.module.head())
        slots = torch.arange(tokens.response.shape[1], device=hidden.device) < tokens.response_length[:, None]
        return ref, torch.zeros_like(ref).masked_scatter(slots, per_token)

    @torch.no_grad()
    def _reference_sums(self, data: EncodedSet[Preference]) -> Tensor:
        """log pi_ref of every chosen and rejected answer, `[pairs, 2]`, on the CPU."""
        assert self.reference is not None
        sums = torch.zeros(len(data.groups), 2)
        for rows in micro_batches(torch.tensor([2 * length for length in data.lengths]), self.micro_tokens):
            tokens = collate_pairs([data.groups[i] for i in rows.tolist()]).to(self.reference.device)
            logp = torch.where(tokens.mask, self.reference.logp(tokens).logp, 0.0).sum(-1)
            sums[rows] = logp.view(2, -1).T.float().cpu()
        return sums


def divergence_from(hidden_ref: Tensor, head_ref: Head, hidden: Tensor, head: Head, rows: int = 256) -> Tensor:
    """KL(pi_ref || pi) (nats) at each position `[N]`, with gradient to pi; `rows` positions' logits live at once."""

    def part(h_ref: Tensor, h: Tensor) -> Tensor:
        logp_ref = head_ref.log_softmax(h_ref)
        return (logp_ref.exp() * (logp_ref - head.log_softmax(h))).sum(-1)

    pieces = zip(hidden_ref.split(rows), hidden.split(rows), strict=True)
    return torch.cat([checkpoint(part, a, b, use_reentrant=False) for a, b in pieces])


def _told(pair: PairLogp, explain: dict[str, Tensor]) -> dict[str, Tensor]:
    """What explains a preference loss: both likelihoods apart, how far they moved, the implicit reward's margin."""
    told = {
        "accuracy": (explain["margin"] > 0).float(),
        "margin": explain["margin"],
        "logp/chosen": pair.chosen.detach(),
        "logp/rejected": pair.rejected.detach(),
    }
    if pair.ref_chosen is not None and pair.ref_rejected is not None:
        told["drift/chosen"] = pair.chosen.detach() - pair.ref_chosen
        told["drift/rejected"] = pair.rejected.detach() - pair.ref_rejected
    return told


def run(recipe: PreferenceRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Trains, and leaves the model in `<run folder>/model`; returns the summary that the run folder holds."""
    session = Session(
        recipe.loss.name, recipe, resume=resume, metric="held_out/accuracy",
        shown=("loss", "accuracy", "held_out/accuracy", "drift/chosen"), health=recipe.health,
    )  # fmt: skip
    with session:
        policy = policy_from(recipe.model, recipe.run, session.device)
        laid = layout(policy.tokenizer, recipe.data)
        loaded = preferences(recipe.data)
        context = context_length(policy.model)
        train = encode(loaded.train, laid, recipe.data, context)
        held_out = encode(loaded.held_out, laid, recipe.data, context) if loaded.held_out else None
        reference = None
        if LOSSES[recipe.loss.name].needs_reference:
            path = recipe.model.path if recipe.reference == "start" else recipe.reference
            reference = policy_from(
                recipe.model.model_copy(update={"path": path}), recipe.run, session.device, trainable=False
            )
        objective = PairObjective(policy, reference, train, held_out, recipe.loss, recipe.run.micro_tokens)
        state = Offline(objective, recipe.train, recipe.optimizer, recipe.run)
        pre = Preflight(f"steersman {recipe.loss.name} ({LOSSES[recipe.loss.name].source})")
        describe_run(pre, session, recipe.train.batch_size, state.total, describe(loaded, train, laid))
        pre.fact("leads to", LOSSES[recipe.loss.name].fixed_point)
        pre.role(policy_role("policy", policy, recipe.model.path, recipe.run.micro_tokens, max(train.lengths)))
        pre.check()
        pre.show()
        state.run(session)
        return finish(session, state, recipe, policy)
