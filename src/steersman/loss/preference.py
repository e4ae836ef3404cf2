"""Losses over a preferred and a dispreferred answer to one prompt: DPO and its relatives.

Every loss takes a `PairLogp` and returns `(loss [B], explain)`, where `explain` holds detached `[B]` tensors:
the implicit rewards of both answers, in the loss's own units, and their margin. The mean over examples is the
caller's. With w and l the chosen and rejected answer, all formulas use

    rho(y) = log pi(y | x) - log pi_ref(y | x)         the log-ratio of an answer, summed over its tokens
"""

from __future__ import annotations

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
    over the vocabulary. What a loss does not need may be None (`offline.LOSSES` says); what it needs and lacks
    is a TypeError.
    """

    chosen: Float[Tensor, " B"]
    rejected: Float[Tensor, " B"]
    chosen_length: Float[Tensor, " B"]
    rejected_length: Float[Tensor, " B"]
    ref_chosen: Float[Tensor, " B"] | None = None
    ref_rejected: Float[Tensor, " B"] | None = None
    chosen_kl: Float[Tensor, " B"] | None = None
    rejected_kl: Float[Tensor, " B"] | None = None


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
) -> PairLogp:
    """Sum per-token log-probabilities (and divergences) over the tokens that count: the one place for masks."""

    def total(x: Tensor | None, mask: Tensor) -> Tensor | None:
        return None if x is None else masked_sum(x, mask, -1)

    return PairLogp(
        masked_sum(chosen, chosen_mask, -1),
        masked_sum(rejected, rejected_mask, -1),
        chosen_mask.sum(-1).to(chosen.dtype),
        rejected_mask.sum(-1).to(rejected.dtype),
        total(ref_chosen, chosen_mask),
        total(ref_rejected, rejected_mask),
        total(chosen_kl, chosen_mask),
        total(rejected_kl, rejected_mask),
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


def _explain(chosen: Tensor, rejected: Tensor) -> Explain:
    chosen, rejected = chosen.detach(), rejected.detach()
    return {"reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected}


def dpo(pair: PairLogp, *, beta: float = 0.1, label_smoothing: float = 0.0) -> tuple[Float[Tensor, " B"], Explain]:
    """Direct preference optimisation; with `label_smoothing` eps in [0, 1/2) the conservative variant.

        L = -(1 - eps) log sigma(m) - eps log sigma(-m),     m = beta (rho(w) - rho(l))

    `beta` > 0 is the strength of the KL penalty that the implicit reward beta rho belongs to.

    Source: arXiv 2305.18290, eq. 7; eps: Mitchell, "A note on DPO with noisy preferences", 2023, eq. 3.
    """
    ratio_w, ratio_l = _ratios(pair)
    m = beta * (ratio_w - ratio_l)
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
    Departure: with `length_normalised`, rho is the mean over an answer's tokens, as several libraries do after
    advice of the authors; the target then is per token and the optimum another.
    """
    ratio_w, ratio_l = _ratios(pair)
    if length_normalised:
        ratio_w = ratio_w / pair.chosen_length.clamp(min=1)
        ratio_l = ratio_l / pair.rejected_length.clamp(min=1)
    loss = (ratio_w - ratio_l - 1 / (2 * beta)) ** 2
    return loss, _explain(beta * ratio_w, beta * ratio_l)


def hinge(pair: PairLogp, *, beta: float = 1.0, margin: float = 1.0) -> tuple[Float[Tensor, " B"], Explain]:
    """Sequence-likelihood calibration: a hinge on the margin between the two answers.

        L = max(0, delta - beta (rho(w) - rho(l)))

    Without reference log-probabilities rho is log pi: SLiC-HF's calibration term at beta = 1, with `margin` its
    delta; its regularisation term is `chosen_nll`. With them it is the hinge-norm loss of RSO at delta = 1.

    Source: arXiv 2305.10425, section 2.2; arXiv 2309.06657, section 3 (hinge-norm).
    """
    if pair.ref_chosen is None:
        ratio_w, ratio_l = pair.chosen, pair.rejected
    else:
        ratio_w, ratio_l = _ratios(pair)
    loss = relu(margin - beta * (ratio_w - ratio_l))
    return loss, _explain(beta * ratio_w, beta * ratio_l)


def dpop(pair: PairLogp, *, beta: float = 0.3, penalty: float = 50.0) -> tuple[Float[Tensor, " B"], Explain]:
    """DPO-positive: DPO that pays for letting the chosen answer fall below the reference.

        L = -log sigma(beta (rho(w) - rho(l) - lambda max(0, -rho(w))))

    `penalty` is lambda >= 0; 0 gives DPO.

    Source: arXiv 2402.13228, eq. 3.
    """
    ratio_w, ratio_l = _ratios(pair)
    loss = -logsigmoid(beta * (ratio_w - ratio_l - penalty * relu(-ratio_w)))
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

        L = -log sigma(beta / |w| log pi(w) - beta / |l| log pi(l) - gamma)

    `margin` is gamma, in reward units.

    Source: arXiv 2405.14734, eq. 6.
    """
    reward_w = beta * pair.chosen / pair.chosen_length.clamp(min=1)
    reward_l = beta * pair.rejected / pair.rejected_length.clamp(min=1)
    return -logsigmoid(reward_w - reward_l - margin), _explain(reward_w, reward_l)


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
    Departure: with `length_normalised_nll` the second term is the mean over tokens, as in the authors' program.
    """
    reward_w, reward_l = beta * pair.chosen, beta * pair.rejected
    loss = -logsigmoid(reward_w - reward_l) + nll_weight * chosen_nll(pair, length_normalised_nll)
    return loss, _explain(reward_w, reward_l)


def chosen_nll(pair: PairLogp, length_normalised: bool = True) -> Float[Tensor, " B"]:
    """-log pi(w) / |w| (or -log pi(w)): add it, weighted, to any loss whose chosen likelihood falls.

    Source: arXiv 2404.19733, eq. 1 (per token); arXiv 2401.08417, section 3 (whole answer).
    """
    return -pair.chosen / pair.chosen_length.clamp(min=1) if length_normalised else -pair.chosen
