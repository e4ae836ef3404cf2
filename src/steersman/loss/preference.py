"""Losses over a preferred and a dispreferred answer to one prompt: DPO and its relatives.

Every loss takes a `PairLogp` and returns `(loss [B], explain)`, where `explain` holds detached `[B]` tensors:
the implicit rewards of both answers, in the loss's own units, and their margin. The mean over examples is the
caller's. With w and l the chosen and rejected answer, all formulas use

    rho(y) = log pi(y | x) - log pi_ref(y | x)         the log-ratio of an answer, summed over its tokens
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from steersman.loss.anchored import apo_down, apo_zero, bco_pair, cal_dpo, nca, sppo
from steersman.loss.f_divergence import fdpo_alpha, fdpo_js
from steersman.loss.pairs import (
    AnswerLogp,
    Explain,
    PairLogp,
    as_batch,
    chosen_nll,
    desensitised,
    divergences,
    gold_nll,
    implicit_rewards,
    less_offset,
    log_ratios,
    mean_log_ratios,
    pair_logp,
    reference_answer,
    soft_labelled,
)
from steersman.loss.reference_free import alphapo, cpo, hinge, log_odds, orpo, simpo
from steersman.loss.transport import aot, aot_unpaired

__all__ = [
    "AnswerLogp",
    "Explain",
    "PairLogp",
    "alphapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "as_batch",
    "bco_pair",
    "cal_dpo",
    "chosen_nll",
    "cpo",
    "desensitised",
    "discopop",
    "dpo",
    "dpo_norm",
    "dpo_shift",
    "dpop",
    "exo",
    "fdpo_alpha",
    "fdpo_js",
    "gold_nll",
    "hinge",
    "ipo",
    "log_odds",
    "nca",
    "orpo",
    "pair_logp",
    "reference_answer",
    "robust_dpo",
    "rso",
    "simpo",
    "soft_labelled",
    "sppo",
    "tdpo1",
    "tdpo2",
    "wpo",
]


def dpo(pair: PairLogp, *, beta: float = 0.1, label_smoothing: float = 0.0) -> tuple[Float[Tensor, " B"], Explain]:
    """Direct preference optimisation; with `label_smoothing` eps in [0, 1/2) the conservative variant.

        L = -(1 - eps) log sigma(m) - eps log sigma(-m),     m = beta (rho(w) - rho(l)) - offset

    `beta` > 0 is the strength of the KL penalty that the implicit reward beta rho belongs to. An offset asks for a
    lead of that size where the answers are known to differ by more than a little.

    Source: arXiv 2305.18290, eq. 7; eps: Mitchell, "A note on DPO with noisy preferences", 2023, eq. 3;
    offset: arXiv 2402.10571.
    Departure from TRL 1.16, whose sigmoid loss has no eps any more: the conservative variant is kept.
    """
    ratio_w, ratio_l = log_ratios(pair)
    m = less_offset(beta * (ratio_w - ratio_l), pair)
    loss = -(1 - label_smoothing) * logsigmoid(m) - label_smoothing * logsigmoid(-m)
    return loss, implicit_rewards(beta * ratio_w, beta * ratio_l)


def robust_dpo(pair: PairLogp, *, beta: float = 0.1, flip: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """DPO made unbiased under labels that were flipped with known probability `flip` eps in [0, 1/2).

        L = [ -(1 - eps) log sigma(m) + eps log sigma(-m) ] / (1 - 2 eps),     m = beta (rho(w) - rho(l))

    Its expectation over flipped labels is DPO's loss on clean ones. A single example's loss may be negative and
    is unbounded below.

    Source: arXiv 2403.00409, section 3.2.
    """
    ratio_w, ratio_l = log_ratios(pair)
    m = beta * (ratio_w - ratio_l)
    loss = (-(1 - flip) * logsigmoid(m) + flip * logsigmoid(-m)) / (1 - 2 * flip)
    return loss, implicit_rewards(beta * ratio_w, beta * ratio_l)


def dpo_norm(pair: PairLogp, *, beta: float = 5.0) -> tuple[Float[Tensor, " B"], Explain]:
    """Length-normalised DPO: the implicit reward is a mean over an answer's tokens, so that length alone earns none.

        L = -log sigma(beta rho(w) / |w| - beta rho(l) / |l| - offset)

    Source: arXiv 2411.15124, section 5, where beta is 5.
    """
    reward_w, reward_l = (beta * ratio for ratio in mean_log_ratios(pair))
    return -logsigmoid(less_offset(reward_w - reward_l, pair)), implicit_rewards(reward_w, reward_l)


def exo(pair: PairLogp, *, beta: float = 0.1, epsilon: float = 1e-3) -> tuple[Float[Tensor, " B"], Explain]:
    """Efficient exact optimisation from pairs: the reverse KL of the policy's own odds from the label's.

        L = sigma(m) log(sigma(m) / (1 - eps)) + sigma(-m) log(sigma(-m) / eps),     m = beta (rho(w) - rho(l))

    `epsilon` in (0, 1/2) is how far the label is from certain: m is pulled to log((1 - eps) / eps), and no further.

    Source: arXiv 2402.00856, eq. 16.
    """
    ratio_w, ratio_l = log_ratios(pair)
    m = beta * (ratio_w - ratio_l)
    loss = m.sigmoid() * (logsigmoid(m) - math.log1p(-epsilon)) + (-m).sigmoid() * (
        logsigmoid(-m) - math.log(epsilon)
    )
    return loss, implicit_rewards(beta * ratio_w, beta * ratio_l)


def discopop(pair: PairLogp, *, beta: float = 0.05, tau: float = 0.05) -> tuple[Float[Tensor, " B"], Explain]:
    """Discovered preference optimisation: logistic for pairs in the wrong order, exponential for those in the right.

        L = -(1 - g) log sigma(m) + g exp(-m),     g = sigma(m / tau),     m = beta (rho(w) - rho(l))

    `tau` lies in (0, 1). The loss is not convex: a little below m = 0 it has a hollow.

    Source: arXiv 2406.08414, eq. 5 (LRML).
    """
    ratio_w, ratio_l = log_ratios(pair)
    m = beta * (ratio_w - ratio_l)
    exponential = (logsigmoid(m / tau) - m).exp()  # in one exponent: exp(-m) alone overflows where its share is 0
    loss = exponential - (-m / tau).sigmoid() * logsigmoid(m)
    return loss, implicit_rewards(beta * ratio_w, beta * ratio_l)


def ipo(pair: PairLogp, *, beta: float = 0.1, length_normalised: bool = False) -> tuple[Float[Tensor, " B"], Explain]:
    """Identity preference optimisation: regress the log-ratio difference onto a finite target.

        L = (rho(w) - rho(l) - 1 / (2 beta))^2

    `beta` is the paper's tau.

    Source: arXiv 2310.12036, eq. 17.
    Departure: with `length_normalised`, rho is the mean over an answer's tokens; the target then is per token and
    the optimum another. TRL does so always, on advice of the authors; without it the loss is the paper's formula,
    whose optimum `steersman verify` reaches, so that is the default here.
    """
    ratio_w, ratio_l = mean_log_ratios(pair) if length_normalised else log_ratios(pair)
    loss = (ratio_w - ratio_l - 1 / (2 * beta)) ** 2
    return loss, implicit_rewards(beta * ratio_w, beta * ratio_l)


def rso(pair: PairLogp, *, beta: float = 0.1, margin: float = 1.0) -> tuple[Float[Tensor, " B"], Explain]:
    """The hinge of statistical rejection sampling optimisation ("hinge-norm"): SLiC relative to a reference.

        L = max(0, delta + offset - beta (rho(w) - rho(l)))

    `margin` is delta, 1 in the paper; `beta` is its gamma.

    Source: arXiv 2309.06657 (hinge-norm).
    """
    ratio_w, ratio_l = log_ratios(pair)
    lead = less_offset(beta * (ratio_w - ratio_l), pair)
    return relu(margin - lead), implicit_rewards(beta * ratio_w, beta * ratio_l)


def dpop(pair: PairLogp, *, beta: float = 0.3, penalty: float = 50.0) -> tuple[Float[Tensor, " B"], Explain]:
    """DPO-positive: DPO that pays for letting the chosen answer fall below the reference.

        L = -log sigma(beta (rho(w) - rho(l) - lambda max(0, -rho(w))))

    `penalty` is lambda >= 0; 0 gives DPO.

    Source: arXiv 2402.13228, eq. 3.
    """
    ratio_w, ratio_l = log_ratios(pair)
    loss = -logsigmoid(beta * (ratio_w - ratio_l - penalty * relu(-ratio_w)))
    return loss, implicit_rewards(beta * ratio_w, beta * ratio_l)


def dpo_shift(pair: PairLogp, *, beta: float = 0.1, shift: float = 0.95) -> tuple[Float[Tensor, " B"], Explain]:
    """DPO that counts the rejected answer a little less, so that the chosen one's likelihood falls less.

        L = -log sigma(beta rho(w) - f beta rho(l))

    `shift` is f in (0, 1], fixed; 1 is DPO. What it gains in likelihood it loses in margin.

    Source: arXiv 2502.07599, eq. 2.
    """
    ratio_w, ratio_l = log_ratios(pair)
    return -logsigmoid(beta * (ratio_w - shift * ratio_l)), implicit_rewards(beta * ratio_w, shift * beta * ratio_l)


def wpo(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Weighted preference optimisation: DPO in which pairs that the policy would not write itself count less.

        L = -w(w) w(l) log sigma(beta (rho(w) - rho(l)))
        w(y) = exp(1/|y| sum_t log(pi(y_t | s_t) / sum_v pi(v | s_t)^2))

    A token of average likelihood under the policy weighs 1. The weights carry no gradient, and their product is cut
    at 1, as in the authors' program (the paper does not say so).

    Source: arXiv 2406.11827, eq. 3 and 5 (sampled alignment).
    """
    if pair.log_weight is None:
        raise TypeError("this loss needs how much the answers are like the policy's own: log_weight")
    ratio_w, ratio_l = log_ratios(pair)
    weight = pair.log_weight.clamp(max=0).exp()
    return -weight * logsigmoid(beta * (ratio_w - ratio_l)), implicit_rewards(beta * ratio_w, beta * ratio_l)


def tdpo1(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Token-level DPO: the margin corrected by the sequential divergences from the reference.

        L = -log sigma(beta (rho(w) - rho(l)) - beta (D(l) - D(w))),    D(y) = sum_t KL(pi_ref || pi)(s_t)

    Gradients run through both divergences.

    Source: arXiv 2404.11999, section 4.3.
    """
    (ratio_w, ratio_l), (kl_w, kl_l) = log_ratios(pair), divergences(pair)
    reward_w, reward_l = beta * (ratio_w + kl_w), beta * (ratio_l + kl_l)
    return -logsigmoid(reward_w - reward_l), implicit_rewards(reward_w, reward_l)


def tdpo2(pair: PairLogp, *, beta: float = 0.1, alpha: float = 0.5) -> tuple[Float[Tensor, " B"], Explain]:
    """Token-level DPO whose divergence term is scaled, and stopped on the chosen side.

        L = -log sigma(beta (rho(w) - rho(l)) - alpha beta (D(l) - sg[D(w)]))

    D as in `tdpo1`, sg the stop-gradient. With alpha = 1 the value is TDPO1's, the gradient is not.

    Source: arXiv 2404.11999, section 4.3.
    """
    (ratio_w, ratio_l), (kl_w, kl_l) = log_ratios(pair), divergences(pair)
    reward_w = beta * (ratio_w + alpha * kl_w.detach())
    reward_l = beta * (ratio_l + alpha * kl_l)
    return -logsigmoid(reward_w - reward_l), implicit_rewards(reward_w, reward_l)
