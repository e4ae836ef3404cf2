"""Policy losses, `[B, T]` each, to be minimised. `adv` carries no gradient.

Ratios are exp(logp - logp_old). Before the first update they are exactly 1 up to rounding, because the engine
records the log-probability under the distribution that it sampled from.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steersman.ops.masked import masked_mean, masked_sum


def reinforce(logp: Float[Tensor, "B T"], adv: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """-A_t log pi(a_t | s_t): the score-function estimator. Source: Williams 1992."""
    return -adv * logp


def surrogate(
    logp: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], adv: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """-rho_t A_t, the importance-weighted objective of TRPO and KL-penalised PPO.

    Source: arXiv 1502.05477, eq. 14.
    """
    return -(logp - logp_old).exp() * adv


def clipped(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    adv: Float[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Float[Tensor, "B T"]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), bounded by `dual_clip` * |A| where A < 0.

    Source: PPO, arXiv 1707.06347, eq. 7; asymmetric clip: DAPO, arXiv 2503.14476, eq. 10; dual clip:
    arXiv 1912.09729, eq. 5 (the bound applies only to negative advantages and must exceed 1).
    """
    ratio = (logp - logp_old).exp()
    loss = torch.maximum(-ratio * adv, -ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    if dual_clip is None:
        return loss
    return torch.where(adv < 0, torch.minimum(loss, -dual_clip * adv), loss)


def sequence_log_ratio(
    logp: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """mean_t (logp - logp_old) over the steps of a response that count, put on every step.

    Source: GSPO, arXiv 2507.18071, eq. 7.
    """
    return masked_mean(logp - logp_old, mask, dim=-1)[:, None].expand_as(logp)


def sequence_clipped(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    adv: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "B T"]:
    """The clipped loss under one ratio per sequence, s = exp(`sequence_log_ratio`), put on every token.

    Source: GSPO, arXiv 2507.18071, eq. 5 to 7. With the "sequence" average its gradient is the paper's.
    """
    return clipped(sequence_log_ratio(logp, logp_old, mask), torch.zeros_like(logp), adv, clip_low, clip_high)


def clipped_weight(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    adv: Float[Tensor, "B T"],
    weight_high: float,
    weight_low: float = 0.0,
) -> Float[Tensor, "B T"]:
    """-stop(clip(rho, weight_low, weight_high)) A log pi: every token keeps a gradient, only its weight is bounded.

    Source: CISPO, arXiv 2506.13585, eq. 4 and 5.
    """
    weight = (logp - logp_old).exp().clamp(weight_low, weight_high).detach()
    return -weight * adv * logp


def geometric_clipped(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    adv: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    log_low: float,
    log_high: float,
) -> Float[Tensor, "B T"]:
    """-A exp(mean_t d_t), d_t = min(d A, clip(d, -log_low, log_high) A) / A, d = logp - logp_old, on every token.

    Each token's log ratio is clipped on its own, the pessimistic way, before the geometric mean is taken; the bounds
    are in nats. A has one sign in a response. Source: GMPO, arXiv 2507.20673. With the "sequence" average its
    gradient is the paper's.
    """
    difference, sign = logp - logp_old, adv.sign()
    kept = sign * torch.minimum(sign * difference, sign * difference.clamp(-log_low, log_high))
    return -adv * masked_mean(kept, mask, dim=-1)[:, None].exp()


def soft_gated(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    adv: Float[Tensor, "B T"],
    tau_positive: float,
    tau_negative: float,
) -> Float[Tensor, "B T"]:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A: a gradient that fades as rho leaves 1.

    At rho = 1 the gradient is that of -rho A. Source: SAPO, arXiv 2511.20347.
    """
    tau = torch.where(adv > 0, tau_positive, tau_negative).to(logp.dtype)
    return -4 / tau * torch.sigmoid(tau * ((logp - logp_old).exp() - 1)) * adv


def gamma_weighted(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    adv: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Float[Tensor, "B T"]:
    """-stop(phi(W)) A log pi, phi(W) = W^k exp(lambda (1 - W)), W = prod_t rho_t over the whole response.

    `positive` are k and lambda, both above 0, where A >= 0; `negative` where A < 0. phi(1) = 1, and it is bounded,
    largest at W = k / lambda. Source: VESPO, arXiv 2602.10693, eq. 20 (c_1 is k, c_2 is lambda).
    """
    log_weight = masked_sum(logp - logp_old, mask, dim=-1)[:, None].detach()

    def log_phi(k: float, lam: float) -> Tensor:
        return k * log_weight + lam * (1 - log_weight.exp())

    return -torch.where(adv >= 0, log_phi(*positive), log_phi(*negative)).exp() * adv * logp


def advantage_regression(
    logp: Float[Tensor, "B T"],
    logp_ref: Float[Tensor, "B T"],
    adv: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    beta: float,
) -> Float[Tensor, "B T"]:
    """(beta sum_t (logp - logp_ref) - A)^2 of a response, put on each of its tokens.

    A is one number per response: its reward less V*(x), in units of reward; `beta` in reward per nat. With the exact
    V* it is 0 for every response where the policy is pi_ref exp(r / beta) / Z, and nowhere else. Its expected
    gradient over the policy's own responses is 2 beta times that of -(E[r] - beta KL), whatever V*(x) is taken off.
    The "sequence" average makes it the mean over responses. Source: A*-PO, arXiv 2505.20686.
    """
    log_ratio = masked_sum(logp - logp_ref, mask, dim=-1)
    return (beta * log_ratio[:, None] - adv).square()


Divergence = Literal["tv", "kl"]


def binary_divergence(
    logp: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], kind: Divergence
) -> Float[Tensor, "B T"]:
    """Divergence of the distributions over {the sampled token, any other}: |p_old - p|, or KL(old || new) in nats.

    Both are lower bounds of the divergence over the whole vocabulary. Source: DPPO, arXiv 2602.04879.
    """
    old, new = logp_old.exp(), logp.exp()
    if kind == "tv":
        return (old - new).abs()
    tiny = torch.finfo(logp.dtype).eps
    rest_old, rest = (1 - old).clamp(min=tiny), (1 - new).clamp(min=tiny)
    return old * (logp_old - logp) + rest_old * (rest_old.log() - rest.log())


def divergence_masked(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    adv: Float[Tensor, "B T"],
    limit: float,
    kind: Divergence,
    weight_high: float,
) -> Float[Tensor, "B T"]:
    """-stop(min(rho, weight_high)) A log pi, but 0 where the step leads away from the sampler beyond `limit`.

    A step leads away where rho > 1 and A > 0 or rho < 1 and A < 0. Source: DPPO, arXiv 2602.04879; the
    bound on the weight is of the authors' code.
    """
    away = (logp > logp_old) == (adv > 0)
    outside = away & (binary_divergence(logp, logp_old, kind) > limit)
    return torch.where(outside.detach(), 0.0, clipped_weight(logp, logp_old, adv, weight_high))
