"""Losses that fit reward models: pairs, rankings, ratings, attributes and steps.

Every function returns one loss per example (per step for `process`); the mean is the caller's, with a
denominator that is counted over the whole optimisation batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, huber_loss, logsigmoid


def pairwise(
    chosen: Float[Tensor, "*B"],
    rejected: Float[Tensor, "*B"],
    *,
    target: Float[Tensor, "*B"] | float = 1.0,
    margin: Float[Tensor, "*B"] | float = 0.0,
) -> Float[Tensor, "*B"]:
    """Bradley-Terry negative log-likelihood of a pair, with a soft label.

        L = -p log sigma(r_w - r_l - m) - (1 - p) log sigma(r_l - r_w - m)

    `target` p in [0, 1] is the probability that the first answer is the better one: 1 for a plain label, 1/2
    for a tie, the share of votes when several raters judged. `margin` m >= 0 (reward units) is how far the
    preferred answer must lead; it asks the same of either answer, so naming the pair the other way round and
    p as 1 - p changes nothing. A pair's weight is the caller's, multiplied onto what is returned.

    Source: Bradley and Terry 1952; arXiv 2203.02155, eq. 1; margin: arXiv 2307.09288, eq. 2.
    Departure: soft labels; with p = 1 it is the papers' loss.
    """
    lead = chosen - rejected
    return -target * logsigmoid(lead - margin) - (1 - target) * logsigmoid(-lead - margin)


NODES = 12
"""Points of the Gauss-Hermite rule of `noisy_pairwise`; a lead of deviation 3 is integrated to 1e-3 nats."""


def noisy_pairwise(
    lead: Float[Tensor, " B"],
    variance: Float[Tensor, " B"],
    *,
    target: Float[Tensor, " B"],
    margin: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """E[L(d)] over a lead d ~ N(lead, variance), L the loss of `pairwise`.

        1 / sqrt(pi) sum_i w_i L(lead + sqrt(2 variance) x_i),  x_i and w_i the Gauss-Hermite rule

    Departure from arXiv 2402.09345, eq. 5: the expectation over the latents' noise is a quadrature and not one draw,
    so it is the same however a batch is split; with a linear decoder the lead is Gaussian, so nothing is lost.
    """
    point, weight = (lead.new_tensor(x) for x in np.polynomial.hermite.hermgauss(NODES))
    at = lead[:, None] + (2 * variance).sqrt()[:, None] * point
    label, ahead = (x[:, None].expand_as(at) for x in (target, margin))
    each = pairwise(at, torch.zeros_like(at), target=label, margin=ahead)
    return (each * weight).sum(-1) / math.sqrt(math.pi)


def ranking(
    score: Float[Tensor, "B K"],
    rank: Int[Tensor, "B K"],
    mask: Bool[Tensor, "B K"],
    *,
    tie_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    """Mean Bradley-Terry loss over all pairs of one prompt's K answers, scored in one forward.

        L = 1 / C(K, 2)  sum over pairs of -log sigma(r_w - r_l)

    `rank` is 0 for the best, or any integers that grow as answers get worse; equal ranks are ties and count as
    p = 1/2 with weight `tie_weight` (0 leaves them out of the sum and of the count). `mask` is True where there
    is an answer. A row without a pair gives 0. The mean over the pairs of a prompt keeps a prompt of many
    answers from weighing quadratically more.

    Source: arXiv 2203.02155, eq. 1. Departure: ties are kept.
    """
    first, second = torch.triu_indices(score.shape[1], score.shape[1], offset=1, device=score.device)
    rank_first, rank_second = rank[:, first], rank[:, second]
    target = 0.5 + 0.5 * torch.sign(rank_second - rank_first).to(score.dtype)
    pair = mask[:, first] & mask[:, second]
    weight = torch.where(rank_first == rank_second, tie_weight, 1.0).to(score.dtype) * pair
    kept = torch.where(mask, score, torch.zeros_like(score))  # before the loss: NaN times 0 is NaN
    total = (weight * pairwise(kept[:, first], kept[:, second], target=target)).sum(-1)
    count = weight.sum(-1)
    return total / torch.where(count > 0, count, torch.ones_like(count))


def plackett_luce(
    score: Float[Tensor, "B K"], rank: Int[Tensor, "B K"], mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """Negative log-likelihood of a whole ranking: the best is drawn first, then the best of the rest, and so on.

        L = sum_i [ log sum_{j: rank_j >= rank_i} exp(r_j) - r_i ]

    Arguments as in `ranking`; in nats per ranking. For K = 2 it is the Bradley-Terry loss.

    Source: Luce 1959; Plackett 1975; arXiv 2305.18290, appendix A.3.
    Departure: tied answers all compete with one another (Breslow's approximation), so they are drawn towards
    equal scores and no order among them is made up.
    """
    floor = torch.finfo(score.dtype).min / 4
    kept = torch.where(mask, score, torch.zeros_like(score))
    standing = (rank[:, None, :] >= rank[:, :, None]) & mask[:, None, :]  # [B, i, j]: j is left when i is drawn
    pool = torch.where(standing, kept[:, None, :], torch.full_like(kept, floor)[:, None, :])
    log_total = torch.logsumexp(pool, dim=-1)
    return torch.where(mask, log_total - kept, torch.zeros_like(kept)).sum(-1)


def huber(score: Float[Tensor, "*s"], rating: Float[Tensor, "*s"], *, delta: float = 1.0) -> Float[Tensor, "*s"]:
    """e^2 / 2 for an error |e| <= delta, delta (|e| - delta / 2) beyond: single wild ratings pull less.

    Source: Huber 1964.
    """
    return huber_loss(score, rating, reduction="none", delta=delta)


def multi_objective(
    score: Float[Tensor, "B A"],
    rating: Float[Tensor, "B A"],
    present: Bool[Tensor, "B A"],
    *,
    weight: Float[Tensor, " A"] | None = None,
) -> Float[Tensor, " B"]:
    """Mean squared error over the attributes that an answer was rated on; 0 where it was rated on none.

        L = sum_a w_a present_a (r_a - y_a)^2 / sum_a w_a present_a

    What stands in `rating` where `present` is False is never read. `weight` [A] >= 0, all 1 by default.

    Source: arXiv 2406.12845, eq. 1. Departure: an answer rated on few attributes weighs like any other.
    """
    importance = present.to(score.dtype) * (1.0 if weight is None else weight)
    error = torch.where(present, score, torch.zeros_like(score)) - torch.where(
        present, rating, torch.zeros_like(rating)
    )
    total = importance.sum(-1)
    return (importance * error**2).sum(-1) / torch.where(total > 0, total, torch.ones_like(total))


def centring(chosen: Float[Tensor, "*B"], rejected: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """(r_w + r_l)^2, which pins the level that a Bradley-Terry likelihood leaves free; add it times about 0.01.

    Source: arXiv 2312.09244, section 2.
    """
    return (chosen + rejected) ** 2


def ranking_centring(score: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Mean of (r_i + r_j)^2 over the pairs of a prompt's answers: `centring` for K answers; 0 without a pair."""
    first, second = torch.triu_indices(score.shape[1], score.shape[1], offset=1, device=score.device)
    pair = mask[:, first] & mask[:, second]
    kept = torch.where(mask, score, torch.zeros_like(score))
    total = (centring(kept[:, first], kept[:, second]) * pair).sum(-1)
    return total / pair.sum(-1).clamp(min=1)


def process(
    logit: Float[Tensor, "B T"], label: Float[Tensor, "B T"], step: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Cross-entropy of "correct so far" at the last token of each reasoning step; 0 elsewhere.

        L_t = -y_t log sigma(r_t) - (1 - y_t) log(1 - sigma(r_t))

    `label` in [0, 1] (a share of roll-outs that succeed is a soft label); `step` marks the tokens where a step
    ends and what stands elsewhere is never read. `reduce` it with `step` as the mask.

    Source: arXiv 2305.20050, section 2; soft labels: arXiv 2312.08935, section 3.
    """
    zero = torch.zeros_like(logit)
    loss = binary_cross_entropy_with_logits(
        torch.where(step, logit, zero), torch.where(step, label, zero), reduction="none"
    )
    return torch.where(step, loss, zero)
