"""Two answers to one prompt as a loss sees them: log-probabilities and lengths, summed under their masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steersman.ops.masked import beyond, masked_sum
from steersman.types import send

Explain = dict[str, Tensor]


class BatchLogp(NamedTuple):
    """Every pair of a batch as a loss of the whole batch sees it, `[N]` each, without gradient, on the CPU.

    `chosen` and `rejected` are log-probabilities of whole answers (nats), `ref_*` the reference's; `weight` is how
    much a pair counts in its given order, `opposite` how much in the other one. `places` [B] says which of the N
    pairs a micro-batch has, each at most once."""

    chosen: Float[Tensor, " N"]
    rejected: Float[Tensor, " N"]
    ref_chosen: Float[Tensor, " N"]
    ref_rejected: Float[Tensor, " N"]
    weight: Float[Tensor, " N"]
    opposite: Float[Tensor, " N"]
    places: Int[Tensor, " B"]

    def swapped(self) -> BatchLogp:
        """The same answers under the opposite labels."""
        return BatchLogp(
            self.rejected, self.chosen, self.ref_rejected, self.ref_chosen, self.opposite, self.weight, self.places
        )


class PairLogp(NamedTuple):
    """What a pair's loss may look at, one number per pair, masks already applied.

    `chosen` and `rejected` are log-probabilities of whole answers (nats), `ref_*` the reference's, `*_length`
    the number of tokens that counted, `*_kl` the sequential divergence sum_t KL(pi_ref(. | s_t) || pi(. | s_t))
    over the vocabulary. `offset` is by how much the chosen answer's implicit reward should lead (reward units; only
    losses with `takes_offset` read it). `log_weight` is how much both answers are like the policy's own: over
    the two, the sum of 1/|y| sum_t (log pi(y_t) - log sum_v pi(v | s_t)^2), without gradient. `*_tail` is the part of
    a log-probability that an answer's tokens beyond the other one's length have, 0 for the shorter answer. `batch` is
    the whole batch that the pairs are of.
    What a loss does not need may be None (`offline.LOSSES` says); what it needs and lacks is a TypeError.
    """

    chosen: Float[Tensor, " B"]
    rejected: Float[Tensor, " B"]
    chosen_length: Float[Tensor, " B"]
    rejected_length: Float[Tensor, " B"]
    ref_chosen: Float[Tensor, " B"] | None = None
    ref_rejected: Float[Tensor, " B"] | None = None
    chosen_kl: Float[Tensor, " B"] | None = None
    rejected_kl: Float[Tensor, " B"] | None = None
    offset: Float[Tensor, " B"] | None = None
    log_weight: Float[Tensor, " B"] | None = None
    chosen_tail: Float[Tensor, " B"] | None = None
    rejected_tail: Float[Tensor, " B"] | None = None
    ref_chosen_tail: Float[Tensor, " B"] | None = None
    ref_rejected_tail: Float[Tensor, " B"] | None = None
    batch: BatchLogp | None = None

    def swapped(self) -> PairLogp:
        """The same answers under the opposite label."""
        return PairLogp(
            self.rejected, self.chosen, self.rejected_length, self.chosen_length, self.ref_rejected, self.ref_chosen,
            self.rejected_kl, self.chosen_kl, None if self.offset is None else -self.offset, self.log_weight,
            self.rejected_tail, self.chosen_tail, self.ref_rejected_tail, self.ref_chosen_tail,
            None if self.batch is None else self.batch.swapped(),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class AnswerLogp:
    """One of the two answers of each pair, token by token: log-probabilities (nats) and the mask of what counts.

    `ref` are the reference's log-probabilities, `kl` the divergences KL(pi_ref(. | s_t) || pi(. | s_t)), and
    `log_weight` is log pi(y_t) - log sum_v pi(v | s_t)^2, each None where the loss does not need it."""

    logp: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    ref: Float[Tensor, "B T"] | None = None
    kl: Float[Tensor, "B T"] | None = None
    log_weight: Float[Tensor, "B T"] | None = None

    @property
    def count(self) -> Int[Tensor, " B"]:
        """How many tokens count."""
        return self.mask.sum(-1)


def pair_logp(chosen: AnswerLogp, rejected: AnswerLogp, *, tails: bool = False) -> PairLogp:
    """Sum per-token log-probabilities (and divergences) over the tokens that count: the one place for masks.

    `tails` asks for the sums beyond the length that both answers share too.
    """

    def total(x: Tensor | None, mask: Tensor) -> Tensor | None:
        return None if x is None else masked_sum(x, mask, -1)

    chosen_length, rejected_length = chosen.count.to(chosen.logp.dtype), rejected.count.to(chosen.logp.dtype)
    log_weight = None
    if chosen.log_weight is not None and rejected.log_weight is not None:
        w = masked_sum(chosen.log_weight, chosen.mask, -1) / chosen_length.clamp(min=1)
        l = masked_sum(rejected.log_weight, rejected.mask, -1) / rejected_length.clamp(min=1)  # noqa: E741
        log_weight = (w + l).detach()
    pair = PairLogp(
        masked_sum(chosen.logp, chosen.mask, -1),
        masked_sum(rejected.logp, rejected.mask, -1),
        chosen_length,
        rejected_length,
        ref_chosen=total(chosen.ref, chosen.mask),
        ref_rejected=total(rejected.ref, rejected.mask),
        chosen_kl=total(chosen.kl, chosen.mask),
        rejected_kl=total(rejected.kl, rejected.mask),
        log_weight=log_weight,
    )
    if not tails:
        return pair
    shared = torch.minimum(chosen.count, rejected.count)
    tail_w, tail_l = beyond(chosen.mask, shared), beyond(rejected.mask, shared)
    return pair._replace(
        chosen_tail=total(chosen.logp, tail_w),
        rejected_tail=total(rejected.logp, tail_l),
        ref_chosen_tail=total(chosen.ref, tail_w),
        ref_rejected_tail=total(rejected.ref, tail_l),
    )


def as_batch(pair: PairLogp, weight: Float[Tensor, " N"], agreement: Float[Tensor, " N"] | None = None) -> BatchLogp:
    """The pairs as a whole batch, each with its weight, of which `agreement` (all, without it) counts in the given
    order and the rest in the opposite one. Every pair has its place."""
    if pair.ref_chosen is None or pair.ref_rejected is None:
        raise TypeError("a batch's distributions need the log-probabilities of a reference: ref_chosen, ref_rejected")
    chosen, rejected = pair.chosen.detach().cpu(), pair.rejected.detach().cpu()
    ref_chosen, ref_rejected = pair.ref_chosen.cpu(), pair.ref_rejected.cpu()
    agreed = torch.ones_like(weight) if agreement is None else agreement
    counted, opposite = weight * agreed, weight * (1 - agreed)
    return BatchLogp(chosen, rejected, ref_chosen, ref_rejected, counted, opposite, torch.arange(len(weight)))


def desensitised(pair: PairLogp, alpha: float) -> PairLogp:
    """LD-DPO: the pair with its tokens beyond the length that both answers share weighed by `alpha` in [0, 1].

        log pi^(y) = sum_{t <= l} log pi(y_t | s_t) + alpha sum_{t > l} log pi(y_t | s_t),     l = min(|w|, |l|)

    The reference's log-probabilities likewise. alpha = 1 changes nothing; at 0 nothing beyond the shared length
    counts. A loss of whole answers' log-probabilities (or of their ratios to the reference) takes it in the place of
    the pair, and is the less sensitive to how long answers are the smaller alpha is. Lengths stay as they are.

    Source: arXiv 2409.06411. As in TRL 1.16; LLaMA-Factory leaves the reference's log-probabilities whole.
    """

    def less(whole: Tensor, tail: Tensor | None) -> Tensor:
        if tail is None:
            raise TypeError("this needs the log-probabilities beyond the length that both answers share: *_tail")
        return whole - (1 - alpha) * tail

    weighed = pair._replace(
        chosen=less(pair.chosen, pair.chosen_tail), rejected=less(pair.rejected, pair.rejected_tail)
    )
    if pair.ref_chosen is None or pair.ref_rejected is None:
        return weighed
    return weighed._replace(
        ref_chosen=less(pair.ref_chosen, pair.ref_chosen_tail),
        ref_rejected=less(pair.ref_rejected, pair.ref_rejected_tail),
    )


def log_ratios(pair: PairLogp) -> tuple[Tensor, Tensor]:
    """rho(w), rho(l)."""
    if pair.ref_chosen is None or pair.ref_rejected is None:
        raise TypeError("this loss needs the log-probabilities of a reference: ref_chosen and ref_rejected")
    return pair.chosen - pair.ref_chosen, pair.rejected - pair.ref_rejected


def mean_log_ratios(pair: PairLogp) -> tuple[Tensor, Tensor]:
    """rho(w) / |w|, rho(l) / |l|."""
    ratio_w, ratio_l = log_ratios(pair)
    return ratio_w / pair.chosen_length.clamp(min=1), ratio_l / pair.rejected_length.clamp(min=1)


def power_reward(logp: Tensor, alpha: float) -> Tensor:
    """(1 - exp(-alpha logp)) / alpha, which is logp at alpha = 0. What lies below -60 / |alpha| counts as that, so
    that neither it nor its gradient overflows."""
    return logp if alpha == 0 else -torch.expm1((-alpha * logp).clamp(max=60)) / alpha


def divergences(pair: PairLogp) -> tuple[Tensor, Tensor]:
    """D(w), D(l)."""
    if pair.chosen_kl is None or pair.rejected_kl is None:
        raise TypeError("this loss needs the divergences from the reference: chosen_kl and rejected_kl")
    return pair.chosen_kl, pair.rejected_kl


def less_offset(lead: Tensor, pair: PairLogp) -> Tensor:
    """The chosen answer's lead, less what it should lead by."""
    return lead if pair.offset is None else lead - pair.offset


def implicit_rewards(chosen: Tensor, rejected: Tensor) -> Explain:
    """The implicit rewards of both answers and their margin, without gradient."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {"reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected}


def chosen_nll(pair: PairLogp, length_normalised: bool = True) -> Float[Tensor, " B"]:
    """-log pi(w) / |w| (or -log pi(w)): add it, weighted, to any loss whose chosen likelihood falls.

    Source: arXiv 2404.19733, eq. 1 (per token); arXiv 2401.08417, section 3 (whole answer).
    """
    return -pair.chosen / pair.chosen_length.clamp(min=1) if length_normalised else -pair.chosen


def gold_nll(logp: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """-log pi(g) / |g|, g a gold answer that is better than both of the pair.

    alpha times it, added to a preference term without a reference, is TPO: with `cpo` at beta 0.01 and nll_weight 0,

        L = -log sigma(beta log pi(w) - beta log pi(l)) - alpha log pi(g) / |g|

    and TPO-L with `simpo`, whose margin is TPO-L's gamma.

    Source: arXiv 2405.16681, eq. 3 (as the authors' program numbers it); the formula as in that program and TRL 1.16.
    Departure: one mean per answer; theirs is one mean over the tokens of a batch's gold answers, which weighs an
    answer by its length."""
    return -masked_sum(logp, mask, -1) / mask.sum(-1).clamp(min=1)


def reference_answer(
    pair: PairLogp, chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """log pi(y'), y' the answer of the pair that the reference gave: `chosen` or `rejected` is 1 there, and the other
    0; 0 where both are.

    alpha > 0 times it, added to DPO's loss, is XPO: the policy is optimistic about what the reference does not say.
    It stays bounded below only while alpha is smaller than beta times the share of pairs that a reference's answer
    wins.

    Source: arXiv 2405.21046, algorithm 1, line 6. Departure: a mean over the pairs and not their sum, so that alpha
    does not depend on how many there are; so does TRL's XPO.
    """
    return chosen * pair.chosen + rejected * pair.rejected


def soft_labelled(
    loss: Callable[[PairLogp], tuple[Float[Tensor, " B"], Explain]], pair: PairLogp, agreement: Float[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Explain]:
    """Any pair loss under a soft label: its expectation when the label is drawn by one of the raters.

        a L(w, l) + (1 - a) L(l, w)

    `agreement` a in [0, 1] is the share of raters who preferred the first answer. Since a population's loss is
    linear in how often a pair is labelled each way, the optimum is that of the raters' single votes. What is
    explained is the pair in the given order. For DPO this is cross-entropy with a as the target.

    Source: arXiv 2310.12036 (a preference is one draw of a Bernoulli variable).
    """
    value, explain = loss(pair)
    if bool((agreement == 1).all()):
        return value, explain
    agreement = send(agreement, value.device)
    return agreement * value + (1 - agreement) * loss(pair.swapped())[0], explain
