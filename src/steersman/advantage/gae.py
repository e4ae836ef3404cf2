"""Generalised advantage estimation and V-trace: advantages with a critic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steersman.advantage.returns import next_step, scan_back, td_error, values
from steersman.types import Trajectory, send


class Advantage(NamedTuple):
    """`adv` weighs the policy's steps; `ret` is what the critic regresses to (None without a critic)."""

    adv: Float[Tensor, "B T"]
    ret: Float[Tensor, "B T"] | None = None

    def to(self, device: torch.device | str) -> Advantage:
        return Advantage(send(self.adv, device), None if self.ret is None else send(self.ret, device))


def gae(traj: Trajectory, lam: float | Float[Tensor, "B 1"]) -> Advantage:
    """A_t = delta_t + discount_t * lam * A_{t+1}, and A_t + V(s_t) as the critic's target.

    lam = 0 is the TD error (low variance, biased by the critic), lam = 1 is the Monte-Carlo return minus V
    (unbiased whatever the critic); it may differ from row to row. Source: arXiv 1506.02438, eq. 16.
    """
    delta = td_error(traj)
    adv = scan_back(delta, traj.discount * lam, traj.mask, delta.new_zeros(len(traj)))
    value, _, _ = values(traj)
    return Advantage(adv, adv + value)


def length_adaptive(mask: Bool[Tensor, "B T"], alpha: float) -> Float[Tensor, "B 1"]:
    """lambda = 1 - 1 / (alpha l), l the row's number of steps; 0 where that is negative (l < 1 / alpha).

    Source: VAPO, arXiv 2504.05118, where the sum of GAE's weights is alpha l.
    """
    return (1 - 1 / (alpha * mask.sum(-1, keepdim=True).clamp(min=1))).clamp(min=0)


def vtrace(
    traj: Trajectory, logp: Float[Tensor, "B T"], lam: float = 1.0, clip_rho: float = 1.0, clip_c: float = 1.0
) -> Advantage:
    """V-trace: advantages and value targets for `logp`'s policy from `logp_old`'s actions.

    v_s = V(s) + sum_t (prod_{i<t} discount_i c_i) rho_t delta_t with rho = min(clip_rho, pi/mu) and
    c = lam * min(clip_c, pi/mu); the policy's advantage is rho_s (r_s + discount_s v_{s+1} - V(s_s)).
    On-policy (logp = logp_old) with lam = 1 the targets are the n-step returns. Source: arXiv 1802.01561, eq. 1.
    """
    ratio = (logp - traj.logp_old).exp()
    rho, c = ratio.clamp(max=clip_rho), lam * ratio.clamp(max=clip_c)
    value, _, end = values(traj)
    correction = scan_back(rho * td_error(traj), traj.discount * c, traj.mask, end.new_zeros(len(traj)))
    target = torch.where(traj.mask, value + correction, torch.zeros_like(value))
    target_next = next_step(target, traj.mask, end)
    adv = rho * (traj.reward + traj.discount * target_next - value)
    return Advantage(torch.where(traj.mask, adv, torch.zeros_like(adv)), target)
