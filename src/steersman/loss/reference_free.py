"""Losses over a preferred and a dispreferred answer that need no reference; the rest is in `preference`.

They take and return what those do: `(loss [B], explain)` of a `PairLogp`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from steersman.loss.pairs import Explain, PairLogp, chosen_nll, implicit_rewards, less_offset, power_reward


def hinge(pair: PairLogp, *, beta: float = 1.0, margin: float = 1.0) -> tuple[Float[Tensor, " B"], Explain]:
    """Sequence-likelihood calibration: a hinge on the lead of the chosen answer's log-probability; no reference.

        L = max(0, delta + offset - beta (log pi(w) - log pi(l)))

    `margin` is delta; `beta` = 1 in the paper, whose regularisation term is `chosen_nll`.

    Source: arXiv 2305.10425, section 2.2.
    """
    reward_w, reward_l = beta * pair.chosen, beta * pair.rejected
    return relu(margin - less_offset(reward_w - reward_l, pair)), implicit_rewards(reward_w, reward_l)


def simpo(pair: PairLogp, *, beta: float = 2.0, margin: float = 1.0) -> tuple[Float[Tensor, " B"], Explain]:
    """Simple preference optimisation: the reward is the answer's mean log-probability; no reference.

        L = -log sigma(beta / |w| log pi(w) - beta / |l| log pi(l) - gamma - offset)

    `margin` is gamma, in reward units, as in the paper (its program, and others, set gamma / beta).

    Source: arXiv 2405.14734, eq. 6.
    """
    reward_w = beta * pair.chosen / pair.chosen_length.clamp(min=1)
    reward_l = beta * pair.rejected / pair.rejected_length.clamp(min=1)
    return -logsigmoid(less_offset(reward_w - reward_l, pair) - margin), implicit_rewards(reward_w, reward_l)


def alphapo(
    pair: PairLogp, *, beta: float = 2.5, margin: float = 0.1, alpha: float = 0.25
) -> tuple[Float[Tensor, " B"], Explain]:
    """AlphaPO: SimPO with a reward of another shape, so that likelihoods move less the smaller they are, or more.

        L = -log sigma(r(w) - r(l) - gamma - offset),    r(y) = beta (1 - p(y)^(-alpha)) / alpha,
        p(y) = pi(y)^(1 / |y|)

    alpha = 0 is SimPO. `margin` is gamma, in reward units. A mean log-probability below -60 / |alpha| counts as that.

    Source: arXiv 2501.03884, eq. 6 and 8.
    """
    reward_w = beta * power_reward(pair.chosen / pair.chosen_length.clamp(min=1), alpha)
    reward_l = beta * power_reward(pair.rejected / pair.rejected_length.clamp(min=1), alpha)
    return -logsigmoid(less_offset(reward_w - reward_l, pair) - margin), implicit_rewards(reward_w, reward_l)


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
    return loss, implicit_rewards(weight * mean_w, weight * mean_l)


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
    return loss, implicit_rewards(reward_w, reward_l)
