"""Returns: what a step was followed by.

All functions take a `Trajectory` (one row, one episode), read only steps whose mask is True, step over holes in
the mask, and give 0 where the mask is False. `discount` is gamma * (1 - terminated), so a terminated episode ends
in 0 and a truncated one in the value of the state after it, where there is a critic, else in 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steersman.ops.masked import last_step, masked_sum
from steersman.types import Trajectory


def scan_back(
    x: Float[Tensor, "B T"], decay: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], end: Float[Tensor, " B"]
) -> Float[Tensor, "B T"]:
    """y_t = x_t + decay_t * y_{t+1} over the steps that count, with y after the last one = `end`; 0 elsewhere."""
    out = torch.zeros_like(x)
    carry = end
    for t in range(x.shape[1] - 1, -1, -1):
        carry = torch.where(mask[:, t], x[:, t] + decay[:, t] * carry, carry)
        out[:, t] = torch.where(mask[:, t], carry, out[:, t])
    return out


def next_step(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], end: Float[Tensor, " B"]) -> Float[Tensor, "B T"]:
    """For each step, `x` at the next step that counts; `end` after the last one."""
    out = torch.empty_like(x)
    carry = end
    for t in range(x.shape[1] - 1, -1, -1):
        out[:, t] = carry
        carry = torch.where(mask[:, t], x[:, t], carry)
    return out


def values(traj: Trajectory) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, " B"]]:
    """V(s_t), V(s_{t+1}) and V of the state after the last step; zeros where the trajectory has no critic."""
    B = len(traj)
    if traj.value is None:
        zero = torch.zeros_like(traj.reward)
        return zero, zero, zero.new_zeros(B)
    after_last = last_step(traj.mask) + 1
    end = traj.value.gather(1, after_last[:, None]).squeeze(1)
    value = torch.where(traj.mask, traj.value[:, :-1], torch.zeros_like(traj.reward))
    return value, next_step(value, traj.mask, end), end


def return_to_go(traj: Trajectory) -> Float[Tensor, "B T"]:
    """G_t = r_t + discount_t * G_{t+1}, bootstrapped after a truncated episode where there is a critic."""
    _, _, end = values(traj)
    return scan_back(traj.reward, traj.discount, traj.mask, end)


def episode_return(traj: Trajectory) -> Float[Tensor, " B"]:
    """Undiscounted sum of a row's rewards: for a response scored once at its end, its score."""
    return masked_sum(traj.reward, traj.mask, dim=-1)


def judged_above(traj: Trajectory, threshold: float) -> Bool[Tensor, " B"]:
    """True for rows whose score is above the threshold as the rewards gave it, before any shaping of scores; for none
    where rows have no score."""
    score = traj.score if traj.judged is None else traj.judged
    return torch.zeros_like(traj.mask[:, 0]) if score is None else score > threshold


def td_error(traj: Trajectory) -> Float[Tensor, "B T"]:
    """delta_t = r_t + discount_t V(s_{t+1}) - V(s_t)."""
    value, value_next, _ = values(traj)
    return torch.where(traj.mask, traj.reward + traj.discount * value_next - value, torch.zeros_like(value))
