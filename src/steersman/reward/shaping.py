"""From scores of responses to rewards of tokens: KL penalty, ends, clipping, running normalisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steersman.ops.kl import KLEstimator, kl_estimate
from steersman.ops.masked import last_step


def kl_shaped(
    scores: Float[Tensor, " B"],
    logp: Float[Tensor, "B T"],
    logp_ref: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    beta: float,
    estimator: KLEstimator = "k1",
    per_token: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """Per-token reward: the KL penalty at every response token, the score at the last one only.

        r_t = -beta * kl_t + [t = last] * score          kl_t = logp_t - logp_ref_t for k1

    With `per_token` its entries stand at their tokens and the last token gets what is left of the score
    (score - sum of per_token, 0 unless the score was shaped), so a row always sums to score - beta * KL.
    Prompt and other masked tokens get 0; a row without a response token gets no score. `beta` in reward per
    nat. Only k1 makes the penalised objective's gradient exact; see `ops.kl`.
    Source: arXiv 1909.08593, eq. 2; arXiv 2203.02155, eq. 2.
    """
    penalty = -beta * kl_estimate(logp, logp_ref, estimator)
    at_end = scores
    reward = penalty
    if per_token is not None:
        placed = torch.where(mask, per_token, torch.zeros_like(per_token))
        reward = reward + placed
        at_end = scores - placed.sum(1)
    steps = torch.arange(mask.shape[1], device=mask.device)
    reward = reward + torch.where(steps == last_step(mask)[:, None], at_end[:, None], torch.zeros_like(reward))
    return torch.where(mask, reward, torch.zeros_like(reward))


def missing_eos_penalty(
    scores: Float[Tensor, " B"], terminated: Bool[Tensor, " B"], penalty: float
) -> Float[Tensor, " B"]:
    """score - penalty where the length limit cut the response; `penalty` in reward, 0 or more."""
    return torch.where(terminated, scores, scores - penalty)


def overlong_penalty(length: Int[Tensor, " B"], max_length: int, buffer: int) -> Float[Tensor, " B"]:
    """DAPO's soft punishment of long responses, in [-1, 0], to be added to the score; lengths in tokens.

        0                                     |y| <= L_max - L_buffer
        ((L_max - L_buffer) - |y|) / L_buffer between
        -1                                    |y| > L_max

    Source: arXiv 2503.14476, eq. 13.
    """
    return (((max_length - buffer) - length) / buffer).clamp(-1.0, 0.0)


class RunningNorm:
    """Mean and standard deviation of every score seen so far, in float64 by Chan's batch update.

    A state with no spread scales by 1: a constant reward becomes 0, never NaN. Source: Chan, Golub, LeVeque
    1983, eq. 2.1; the variance divides by n.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, scores: Float[Tensor, " B"]) -> None:
        x = scores.detach().double()
        n, mean = x.numel(), float(x.mean())
        delta, count = mean - self.mean, self.count + n
        self.m2 += float((x - mean).square().sum()) + delta**2 * self.count * n / count
        self.mean += delta * n / count
        self.count = count

    @property
    def std(self) -> float:
        spread = math.sqrt(self.m2 / self.count) if self.count else 0.0
        return spread if spread > 1e-8 * max(1.0, abs(self.mean)) else 1.0

    def normalise(self, scores: Float[Tensor, " B"], shift: bool = True) -> Float[Tensor, " B"]:
        """(score - mean) / std, or score / std without `shift`."""
        centred = scores.double() - (self.mean if shift else 0.0)
        return (centred / self.std).to(scores.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.m2 = int(state["count"]), float(state["mean"]), float(state["m2"])


def constant_note(scores: Float[Tensor, " B"]) -> str | None:
    """What to tell the user when every score of a batch is the same, so that nothing can be learned; else None."""
    if scores.numel() < 2 or float(scores.max() - scores.min()) > 1e-6 * max(1.0, float(scores.abs().max())):
        return None
    return (
        f"all {scores.numel()} rewards of this batch are {float(scores[0]):.4g}: there is nothing to learn from. "
        f"The task may be too hard or solved already, the temperature too low, or the reward may read the "
        f"wrong column"
    )
