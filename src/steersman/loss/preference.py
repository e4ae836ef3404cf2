"""Losses over a preferred and a dispreferred answer to one prompt: DPO and its relatives.

Every loss takes a `PairLogp` and returns `(loss [B], explain)`, where `explain` holds detached `[B]` tensors:
the implicit rewards of both answers, in the loss's own units, and their margin. The mean over examples is the
caller's. With w and l the chosen and rejected answer, all formulas use

    rho(y) = log pi(y | x) - log pi_ref(y | x)         the log-ratio of an answer, summed over its tokens
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from steersman.ops.masked import masked_sum

Explain = dict[str, Tensor]


class PairLogp(NamedTuple):
    """What a pair's loss may look at, one number per pair, masks already applied.

    `chosen` and `rejected` are log-probabilities of whole answers (nats), `ref_*` the reference's, `*_length`
    the number of tokens that counted, `*_kl` the sequential divergence sum_t KL(pi_ref(. | s_t) || pi(. | s_t))
    over the vocabulary. `offset` is by how much the chosen answer's implicit reward should lead (reward units; only
    losses with `takes_offset` read it). `own` is how much both answers are like the policy's own: over the two, the
    sum of 1/|y| sum_t (log pi(y_t) - log sum_v pi(v | s_t)^2), without gradient.
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
    own: Float[Tensor, " B"] | None = None

    def swapped(self) -> PairLogp:
        """The same answers under the opposite label."""
        return PairLogp(
            self.rejected, self.chosen, self.rejected_length, self.chosen_length, self.ref_rejected, self.ref_chosen,
            self.rejected_kl, self.chosen_kl, None if self.offset is None else -self.offset, self.own,
        )  # fmt: skip


def pair_logp(
    chosen: Float[Tensor, "B T"],
    chosen_mask: Bool[Tensor, "B T"],
    rejected: Float[Tensor, "B S"],
    rejected_mask: Bool[Tensor, "B S"],
    *,
    ref_chosen: Float[Tensor, "B T"] | None = None,
    ref_rejected: Float[Tensor, "B S"] | None = None,
    chosen_kl: Float[Tensor, "B T"] | None = None,
    rejected_kl: Float[Tensor, "B S"] | None = None,
    chosen_own: Float[Tensor, "B T"] | None = None,
    rejected_own: Float[Tensor, "B S"] | None = None,
) -> PairLogp:
    """Sum per-token log-probabilities (and divergences) over the tokens that count: the one place for masks."""

    def total(x: Tensor | None, mask: Tensor) -> Tensor | None:
        return None if x is None else masked_sum(x, mask, -1)

    chosen_length, rejected_length = chosen_mask.sum(-1).to(chosen.dtype), rejected_mask.sum(-1).to(chosen.dtype)
    own = None
    if chosen_own is not None and rejected_own is not None:
        sides = ((chosen_own, chosen_mask, chosen_length), (rejected_own, rejected_mask, rejected_length))
        own = sum(
            (masked_sum(x, mask, -1) / length.clamp(min=1) for x, mask, length in sides), start=chosen.new_zeros(())
        )
        own = own.detach()
    return PairLogp(
        masked_sum(chosen, chosen_mask, -1),
        masked_sum(rejected, rejected_mask, -1),
        chosen_length,
        rejected_length,
        total(ref_chosen, chosen_mask),
        total(ref_rejected, rejected_mask),
        total(chosen_kl, chosen_mask),
        total(rejected_kl, rejected_mask),
        own=own,
    )


def _ratios(pair: PairLogp) -> tuple[Tensor, Tensor]:
    """rho(w), rho(l)."""
    if pair.ref_chosen is None or pair.ref_rejected is None:
        raise TypeError("this loss needs the log-probabilities of a reference: ref_chosen and ref_rejected")
    return pair.chosen - pair.ref_chosen, pair.rejected - pair.ref_rejected


def _divergences(pair: PairLogp) -> tuple[Tensor, Tensor]:
    """D(w), D(l)."""
    if pair.chosen_kl is None or pair.rejected_kl is None:
        raise TypeError("this loss needs the divergences from the reference: chosen_kl and rejected_kl")
    return pair.chosen_kl, pair.rejected_kl


def _less_offset(lead: Tensor, pair: PairLogp) -> Tensor:
    return lead if pair.offset is None else lead - pair.offset


def _explain(chosen: Tensor, rejected: Tensor) -> Explain:
    chosen, rejected = chosen.detach(), rejected.detach()
    return {"reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected}


def dpo(pair: PairLogp, *, beta: float = 0.1, label_smoothing: float = 0.0) -> tuple[Float[Tensor, " B"], Explain]:
    """Direct preference optimisation; with `label_smoothing` eps in [0, 1/2) the conservative variant.

        L = -(1 - eps) log sigma(m) - eps log sigma(-m),     m = beta (rho(w) - rho(l)) - offset

    `beta` > 0 is the strength of the KL penalty that the implicit reward beta rho belongs to. An offset asks for a
    lead of that size where the answers are known to differ by more than a little.

    Source: arXiv 2305.18290, eq. 7; eps: Mitchell, "A note on DPO with noisy preferences", 2023, eq. 3;
    offset: arXiv 2402.10571.
    Departure from TRL 1.16, whose sigmoid loss has no eps any more: the conservative variant is kept.
    """
    ratio_w, ratio_l = _ratios(pair)
    m = _less_offset(beta * (ratio_w - ratio_l), pair)
    loss = -(1 - label_smoothing) * logsigmoid(m) - label_smoothing * logsigmoid(-m)
    return loss, _explain(beta * ratio_w, beta * ratio_l)


def robust_dpo(pair: PairLogp, *, beta: float = 0.1, flip: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """DPO made unbiased under labels that were flipped with known probability `flip` eps in [0, 1/2).

        L = [ -(1 - eps) log sigma(m) + eps log sigma(-m) ] / (1 - 2 eps),     m = beta (rho(w) - rho(l))

    Its expectation over flipped labels is DPO's loss on clean ones. A single example's loss may be negative and
    is unbounded below.

    Source: arXiv 2403.00409, section 3.2.
    """
    ratio_w, ratio_l = _ratios(pair)
    m = beta * (ratio_w - ratio_l)
    loss = (-(1 - flip) * logsigmoid(m) + flip * logsigmoid(-m)) / (1 - 2 * flip)
    return loss, _explain(beta * ratio_w, beta * ratio_l)


def ipo(pair: PairLogp, *, beta: float = 0.1, length_normalised: bool = False) -> tuple[Float[Tensor, " B"], Explain]:
    """Identity preference optimisation: regress the log-ratio difference onto a finite target.

        L = (rho(w) - rho(l) - 1 / (2 beta))^2

    `beta` is the paper's tau.

    Source: arXiv 2310.12036, eq. 17.
    Departure: with `length_normalised`, rho is the mean over an answer's tokens; the target then is per token and
    the optimum another. TRL does so always, on advice of the authors; without it the loss is the paper's formula,
    whose optimum `steersman verify` reaches, so that is the default here.
    """
    ratio_w, ratio_l = _ratios(pair)
    if length_normalised:
        ratio_w = ratio_w / pair.chosen_length.clamp(min=1)
        ratio_l = ratio_l / pair.rejected_length.clamp(min=1)
    loss = (ratio_w - ratio_l - 1 / (2 * beta)) ** 2
    return loss, _explain(beta * ratio_w, beta * ratio_l)


def hinge(pair: PairLogp, *, beta: float = 1.0, margin: float = 1.0) -> tuple[Float[Tensor, " B"], Explain]:
    """Sequence-likelihood calibration: a hinge on the lead of the chosen answer's log-probability; no reference.

        L = max(0, delta + offset - beta (log pi(w) - log pi(l)))

    `margin` is delta; `beta` = 1 in the paper, whose regularisation term is `chosen_nll`.

    Source: arXiv 2305.10425, section 2.2.
    """
    reward_w, reward_l = beta * pair.chosen, beta * pair.rejected
    return relu(margin - _less_offset(reward_w - reward_l, pair)), _explain(reward_w, reward_l)


def rso(pair: PairLogp, *, beta: float = 0.1, margin: float = 1.0) -> tuple[Float[Tensor, " B"], Explain]:
    """The hinge of statistical rejection sampling optimisation ("hinge-norm"): SLiC relative to a reference.

        L = max(0, delta + offset - beta (rho(w) - rho(l)))

    `margin` is delta, 1 in the paper; `beta` is its gamma.

    Source: arXiv 2309.06657 (hinge-norm).
    """
    ratio_w, ratio_l = _ratios(pair)
    lead = _less_offset(beta * (ratio_w - ratio_l), pair)
    return relu(margin - lead), _explain(beta * ratio_w, beta * ratio_l)


def dpop(pair: PairLogp, *, beta: float = 0.3, penalty: float = 50.0) -> tuple[Float[Tensor, " B"], Explain]:
    """DPO-positive: DPO that pays for letting the chosen answer fall below the reference.

        L = -log sigma(beta (rho(w) - rho(l) - lambda max(0, -rho(w))))

    `penalty` is lambda >= 0; 0 gives DPO.

    Source: arXiv 2402.13228, eq. 3.
    """
    ratio_w, ratio_l = _ratios(pair)
    loss = -logsigmoid(beta * (ratio_w - ratio_l - penalty * relu(-ratio_w)))
    return loss, _explain(beta * ratio_w, beta * ratio_l)


def dpo_shift(pair: PairLogp, *, beta: float = 0.1, shift: float = 0.95) -> tuple[Float[Tensor, " B"], Explain]:
    """DPO that counts the rejected answer a little less, so that the chosen one's likelihood falls less.

        L = -log sigma(beta rho(w) - f beta rho(l))

    `shift` is f in (0, 1], fixed; 1 is DPO. What it gains in likelihood it loses in margin.

    Source: arXiv 2502.07599, eq. 2.
    """
    ratio_w, ratio_l = _ratios(pair)
    return -logsigmoid(beta * (ratio_w - shift * ratio_l)), _explain(beta * ratio_w, shift * beta * ratio_l)


def wpo(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Weighted preference optimisation: DPO in which pairs that the policy would not write itself count less.

        L = -w(w) w(l) log sigma(beta (rho(w) - rho(l)))
        w(y) = exp(1/|y| sum_t log(pi(y_t | s_t) / sum_v pi(v | s_t)^2))

    A token of average likelihood under the policy weighs 1. The weights carry no gradient, and their product is cut
    at 1, as in the authors' program (the paper does not say so).

    Source: arXiv 2406.11827, eq. 3 and 5 (sampled alignment).
    """
    if pair.own is None:
        raise TypeError("this loss needs how much the answers are like the policy's own: own")
    ratio_w, ratio_l = _ratios(pair)
    weight = pair.own.clamp(max=0).exp()
    return -weight * logsigmoid(beta * (ratio_w - ratio_l)), _explain(beta * ratio_w, beta * ratio_l)


def cal_dpo(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Calibrated DPO: the log-ratios themselves are pulled to their rewards over beta, not only their difference.

        L = -log sigma(rho(w) - rho(l)) + (rho(w) - 1 / (2 beta))^2 + (rho(l) + 1 / (2 beta))^2

    The rewards are 1/2 for a chosen answer and -1/2 for a rejected one.

    Source: arXiv 2412.14516, eq. 11.
    """
    ratio_w, ratio_l = _ratios(pair)
    calibrated = (ratio_w - 0.5 / beta).square() + (ratio_l + 0.5 / beta).square()
    return calibrated - logsigmoid(ratio_w - ratio_l), _explain(beta * ratio_w, beta * ratio_l)


def sppo(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Self-play preference optimisation: each answer's log-ratio is fitted to how often it wins, less one half.

        L = (rho(w) - 1 / (2 beta))^2 + (rho(l) + 1 / (2 beta))^2

    1 / beta is its eta. With soft labels (`soft_labelled`) the target of an answer that wins a share a is
    (a - 1/2) / beta, as the paper has it. In rounds whose reference is the last policy (`online-dpo` with
    `reference: last`) the policy climbs toward the equilibrium of the preference game.

    Source: arXiv 2405.00675, eq. 4.7.
    """
    ratio_w, ratio_l = _ratios(pair)
    loss = (ratio_w - 0.5 / beta).square() + (ratio_l + 0.5 / beta).square()
    return loss, _explain(beta * ratio_w, beta * ratio_l)


def tdpo1(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Token-level DPO: the margin corrected by the sequential divergences from the reference.

        L = -log sigma(beta (rho(w) - rho(l)) - beta (D(l) - D(w))),    D(y) = sum_t KL(pi_ref || pi)(s_t)

    Gradients run through both divergences.

    Source: arXiv 2404.11999, section 4.3.
    """
    (ratio_w, ratio_l), (kl_w, kl_l) = _ratios(pair), _divergences(pair)
    reward_w, reward_l = beta * (ratio_w + kl_w), beta * (ratio_l + kl_l)
    return -logsigmoid(reward_w - reward_l), _explain(reward_w, reward_l)


def tdpo2(pair: PairLogp, *, beta: float = 0.1, alpha: float = 0.5) -> tuple[Float[Tensor, " B"], Explain]:
    """Token-level DPO whose divergence term is scaled, and stopped on the chosen side.

        L = -log sigma(beta (rho(w) - rho(l)) - alpha beta (D(l) - sg[D(w)]))

    D as in `tdpo1`, sg the stop-gradient. With alpha = 1 the value is TDPO1's, the gradient is not.

    Source: arXiv 2404.11999, section 4.3.
    """
    (ratio_w, ratio_l), (kl_w, kl_l) = _ratios(pair), _divergences(pair)
    reward_w = beta * (ratio_w + alpha * kl_w.detach())
    reward_l = beta * (ratio_l + alpha * kl_l)
    return -logsigmoid(reward_w - reward_l), _explain(reward_w, reward_l)


def simpo(pair: PairLogp, *, beta: float = 2.0, margin: float = 1.0) -> tuple[Float[Tensor, " B"], Explain]:
    """Simple preference optimisation: the reward is the answer's mean log-probability; no reference.

        L = -log sigma(beta / |w| log pi(w) - beta / |l| log pi(l) - gamma - offset)

    `margin` is gamma, in reward units, as in the paper (its program, and others, set gamma / beta).

    Source: arXiv 2405.14734, eq. 6.
    """
    reward_w = beta * pair.chosen / pair.chosen_length.clamp(min=1)
    reward_l = beta * pair.rejected / pair.rejected_length.clamp(min=1)
    return -logsigmoid(_less_offset(reward_w - reward_l, pair) - margin), _explain(reward_w, reward_l)


def alphapo(
    pair: PairLogp, *, beta: float = 2.5, margin: float = 0.1, alpha: float = 0.25
) -> tuple[Float[Tensor, " B"], Explain]:
    """AlphaPO: SimPO with a reward of another shape, so that likelihoods move less the smaller they are, or more.

        L = -log sigma(r(w) - r(l) - gamma - offset),    r(y) = beta (1 - p(y)^(-alpha)) / alpha,
        p(y) = pi(y)^(1 / |y|)

    alpha = 0 is SimPO. `margin` is gamma, in reward units. A mean log-probability below -60 / |alpha| counts as that.

    Source: arXiv 2501.03884, eq. 6 and 8.
    """

    def reward(logp: Tensor, length: Tensor) -> Tensor:
        mean = logp / length.clamp(min=1)
        return beta * mean if alpha == 0 else -beta * torch.expm1((-alpha * mean).clamp(max=60)) / alpha

    reward_w, reward_l = reward(pair.chosen, pair.chosen_length), reward(pair.rejected, pair.rejected_length)
    return -logsigmoid(_less_offset(reward_w - reward_l, pair) - margin), _explain(reward_w, reward_l)


def log_odds(logp: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log(p / (1 - p)) of p = exp(logp); p is kept one rounding step below 1, where the odds are infinite."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def orpo(pair: PairLogp, *, weight: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Odds-ratio preference optimisation: fine-tuning on the chosen answer plus an odds-ratio term.

        L = -log p(w) - lambda log sigma(log odds(w) - log odds(l)),    log p(y) = log pi(y) / |y|,
        odds = p / (1 - p)

    `weight` is lambda. The implicit rewards are lambda log p.

    Source: arXiv 2403.07691, eq. 3-7.
    Departure from TRL, and from the authors' program by default: the likelihood term is over the answer's tokens,
    one mean per answer, as in the paper's eq. 2; theirs is one mean over the prompts' and answers' tokens of a
    batch, which trains on the prompt and weighs an answer by its length.
    """
    mean_w = pair.chosen / pair.chosen_length.clamp(min=1)
    mean_l = pair.rejected / pair.rejected_length.clamp(min=1)
    loss = -mean_w - weight * logsigmoid(log_odds(mean_w) - log_odds(mean_l))
    return loss, _explain(weight * mean_w, weight * mean_l)


def cpo(
    pair: PairLogp, *, beta: float = 0.1, nll_weight: float = 1.0, length_normalised_nll: bool = False
) -> tuple[Float[Tensor, " B"], Explain]:
    """Contrastive preference optimisation: DPO with a uniform reference, plus likelihood of the chosen answer.

        L = -log sigma(beta log pi(w) - beta log pi(l)) - lambda log pi(w)

    `nll_weight` is lambda, 1 in the paper.

    Source: arXiv 2401.08417, section 3.
    Departure: with `length_normalised_nll` the second term is the mean over the answer's tokens. The authors'
    program and TRL take it per token too, as one mean over all tokens of a batch, so that an answer's weight there
    depends on the lengths of its neighbours.
    """
    reward_w, reward_l = beta * pair.chosen, beta * pair.rejected
    loss = -logsigmoid(reward_w - reward_l) + nll_weight * chosen_nll(pair, length_normalised_nll)
    return loss, _explain(reward_w, reward_l)


def chosen_nll(pair: PairLogp, length_normalised: bool = True) -> Float[Tensor, " B"]:
    """-log pi(w) / |w| (or -log pi(w)): add it, weighted, to any loss whose chosen likelihood falls.

    Source: arXiv 2404.19733, eq. 1 (per token); arXiv 2401.08417, section 3 (whole answer).
    """
    return -pair.chosen / pair.chosen_length.clamp(min=1) if length_normalised else -pair.chosen


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
    return agreement * value + (1 - agreement) * loss(pair.swapped())[0], explain
