"""Baselines without a critic: other samples of the same prompt, or one reference response."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steersman.advantage.returns import episode_return
from steersman.types import Trajectory

GroupScale = Literal["none", "group", "batch", "batch_scores"]
DIVIDES_BY = (
    "standard deviation that advantages are divided by: none; group (of the group's scores); batch (of all scores "
    "less their group's mean); batch_scores (of all raw scores, as TRL's scale_rewards: batch)"
)


def _group_sums(
    score: Float[Tensor, " B"], group: Int[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " G"], Float[Tensor, " G"]]:
    _, member = group.unique(return_inverse=True)
    groups = int(member.max()) + 1 if len(member) else 0
    zero = score.new_zeros(groups)
    return member, zero.index_add(0, member, score), zero.index_add(0, member, torch.ones_like(score))


def leave_one_out(score: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """score_i minus the mean of the others of its group: an unbiased baseline; 0 for a group of one.

    Source: RLOO, arXiv 2402.14740, section 2.3 (Kool et al. 2019).
    """
    member, total, count = _group_sums(score, group)
    others = (count[member] - 1).clamp(min=1)
    baseline = (total[member] - score) / others
    return torch.where(count[member] > 1, score - baseline, torch.zeros_like(score))


def group_mean(
    score: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    scale: GroupScale = "group",
    eps: float = 1e-4,
    deviation_of: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """score_i minus its group's mean, divided by a standard deviation + eps, or not.

    `scale` says which deviation: `group`, of the group's scores; `batch`, of all score_i minus their group's mean
    (what the prompts differ in does not count); `batch_scores`, of all scores as they are (what TRL's
    `scale_rewards="batch"` does: where prompts differ in difficulty, every advantage becomes smaller).

    The mean contains score_i, so without scaling the gradient is (G - 1) / G times the exact one; dividing by the
    group's deviation weighs prompts by how hard they are to tell apart (a bias that Dr.GRPO, arXiv 2503.20783,
    removes). The deviation divides by n - 1. A group whose scores are all equal gets exactly 0: no signal.
    `deviation_of` is measured in the place of `score` where that holds a KL penalty: the noise of a penalty must
    not be blown up to unit size where the scores themselves say nothing.
    Source: GRPO, arXiv 2402.03300, section 4.1.2.
    """
    member, total, count = _group_sums(score, group)
    centred = score - (total / count)[member]
    if scale == "none":
        return centred
    if deviation_of is None:
        deviation_of, own = score, centred
    else:
        own = group_mean(deviation_of, group, "none")
    if scale == "batch_scores":
        deviation = deviation_of.std().nan_to_num(0.0).expand_as(score)
    elif scale == "batch":
        deviation = (own.square().sum() / max(len(score) - 1, 1)).sqrt().expand_as(score)
    else:
        squares = torch.zeros_like(total).index_add(0, member, own.square())
        deviation = (squares / (count - 1).clamp(min=1)).sqrt()[member]
    return torch.where(no_signal(deviation_of, group), torch.zeros_like(score), centred / (deviation + eps))


def first_success(
    score: Float[Tensor, " B"], group: Int[Tensor, " B"], least: float, *, own: bool = False
) -> Int[Tensor, " B"]:
    """The row of the first sample in each one's group whose score is at least `least`; -1 where there is none.

    Without `own` it is another one than the sample itself. Samples of a group are drawn apart, so that what stands
    beside a sample then says nothing of the sample. Source: arXiv 2601.20802, whose program takes the first one too.
    """
    none, (_, which) = len(score), group.unique(return_inverse=True)
    row = torch.arange(none, device=score.device)

    def earliest(rows: Bool[Tensor, " B"]) -> Int[Tensor, " B"]:
        return torch.full_like(row, none).scatter_reduce(0, which, torch.where(rows, row, none), "amin")[which]

    good = score >= least
    found = earliest(good)
    if not own:
        found = torch.where(found == row, earliest(good & (row != found)), found)
    return torch.where(found < none, found, -1)


def no_signal(score: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """True for every sample of a group in which all scores are exactly equal: it can teach nothing."""
    member, total, _ = _group_sums(score, group)
    high = torch.full_like(total, -torch.inf).scatter_reduce(0, member, score, "amax")
    low = torch.full_like(total, torch.inf).scatter_reduce(0, member, score, "amin")
    return (high == low)[member]


def decoupled(traj: Trajectory, scale: GroupScale) -> Float[Tensor, " B"]:
    """sum_k w_k (r_k - group mean) / (deviation of r_k + eps): each reward part with its own deviation.

    What the return holds besides the parts (a KL term, shaping) is compared with its group's mean and not divided.
    Without `traj.parts` the score is the one part. Source: GDPO, arXiv 2601.05242.
    """
    total = episode_return(traj)
    group = torch.zeros_like(total, dtype=torch.long) if traj.group is None else traj.group
    score = total if traj.score is None else traj.score
    parts = torch.stack([score, torch.ones_like(score)], -1)[:, None] if traj.parts is None else traj.parts
    out = group_mean(total - parts.prod(-1).sum(-1), group, "none")
    for part in parts.unbind(1):
        out = out + part[:, 1] * group_mean(part[:, 0], group, scale)
    return out


def signal_weight(traj: Trajectory) -> float:
    """alpha = B / (B - M): all responses over those in groups whose scores differ; 1 where none do.

    A row of which no step counts is no response: it only stands beside others. Source: GPG, arXiv 2504.02546.
    """
    if traj.score is None or traj.group is None:
        return 1.0
    responses = traj.mask.any(-1)
    heard = int((responses & ~no_signal(traj.score, traj.group)).sum())
    return int(responses.sum()) / heard if heard else 1.0


def efficient_rows(traj: Trajectory, share: float, by: Literal["length", "efficiency"]) -> Bool[Tensor, " B"]:
    """True for the part `share` of each group that is shortest, or has the most score per token.

    The score is what the rewards said, before any shaping: one that is normalised is negative for half of the
    responses, and less so per token the longer they are. Source: GFPO, arXiv 2508.09726.
    """
    length = traj.mask.sum(-1)
    score = traj.judged
    if score is None:
        score = episode_return(traj) if traj.score is None else traj.score
    group = torch.zeros_like(length) if traj.group is None else traj.group
    return best_rows(-length.to(score.dtype) if by == "length" else score / length.clamp(min=1), group, share)


def best_rows(worth: Float[Tensor, " B"], group: Int[Tensor, " B"], share: float) -> Bool[Tensor, " B"]:
    """True for the part `share` of each group, at least two, whose `worth` is largest; ties by order."""
    kept = torch.zeros_like(worth, dtype=torch.bool)
    for name in group.unique():
        rows = (group == name).nonzero().flatten()
        count = max(2, round(share * len(rows)))
        kept[rows[worth[rows].argsort(descending=True, stable=True)[:count]]] = True
    return kept


def spread(score: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """One number per response put on each of its tokens; 0 where the mask is False."""
    return torch.where(mask, score[:, None], torch.zeros((), dtype=score.dtype, device=score.device))
