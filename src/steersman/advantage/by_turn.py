"""Baselines per turn: what an episode earns from its turn k on, beside what its siblings earn from theirs.

    A_{i,k} = G_{i,k} - mean_{j != i} G_{j,k},   G_{i,k} = sum_{l >= k} gamma^(l - k) r_{i,l}

Every turn becomes a row of its own, in the group of the k-th turns of its prompt, and the method's own advantage is
taken over these rows: leave-one-out, group mean, deviation and whatever else it does. What was paid before a turn is
no reason for what is said in it, so nothing is lost and noise is. Siblings that ended before turn k earn 0 from there
on; one of them stands in where no other sibling has a k-th turn, so that no turn is without a baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.advantage.returns import return_to_go
from steersman.ops.masked import last_step
from steersman.types import Trajectory


def by_turn(advantage: Callable[[Trajectory], Advantage], traj: Trajectory) -> Advantage:
    """The method's `advantage`, taken turn by turn where `traj.turn` numbers the turns, else over whole episodes.

    The method's `penalty_mask` is put into `traj`. A turn's `score` is what the episode was paid from it on, without
    any KL penalty, where `traj.paid` is there: of that deviations are measured, and by it groups without signal are
    told. A turn has no `parts`, `judged` or `weight`.
    """
    if traj.turn is None:
        return advantage(traj)
    episode, rows = _rows(traj)
    found = advantage(rows)
    traj.penalty_mask = (
        None if rows.penalty_mask is None else _joined(traj, episode, rows.penalty_mask & rows.mask) > 0
    )
    return Advantage(_joined(traj, episode, found.adv))


def _rows(traj: Trajectory) -> tuple[Tensor, Trajectory]:
    """The number of each row's episode, and the turns as rows."""
    assert traj.turn is not None
    number = torch.where(traj.mask, traj.turn, -1)
    turns = torch.arange(int(number.max()) + 1, device=number.device)
    episode, turn = (number[:, None] == turns[:, None]).any(-1).nonzero().unbind(1)
    prompt = torch.zeros_like(traj.mask[:, 0], dtype=torch.long) if traj.group is None else traj.group
    group = prompt.unique(return_inverse=True)[1] * len(turns) + turn.new_zeros(len(traj))
    stand_ins = _stand_ins(prompt, group, episode, turn)
    episode, turn, real = (
        torch.cat([episode, stand_ins[0]]), torch.cat([turn, stand_ins[1]]),
        torch.arange(len(episode) + len(stand_ins[0]), device=turn.device) < len(episode),
    )  # fmt: skip
    mask = (number[episode] == turn[:, None]) & real[:, None]
    first, last = mask.long().argmax(1), last_step(mask).clamp(min=0)
    each = torch.arange(len(episode), device=turn.device)

    def from_its_turn_on(reward: Tensor) -> Tensor:
        to_go = return_to_go(replace(traj, reward=reward))[episode, first]
        return torch.where(real, to_go, torch.zeros_like(to_go))

    reward = torch.zeros_like(traj.reward[episode])
    reward[each, last] = from_its_turn_on(traj.reward)
    ref, baseline = traj.logp_ref, traj.baseline
    return episode, Trajectory(
        mask, reward, traj.discount[episode], traj.logp_old[episode], None if ref is None else ref[episode],
        group=group[episode] + turn, baseline=None if baseline is None else baseline[episode],
        score=None if traj.paid is None else from_its_turn_on(traj.paid),
    )  # fmt: skip


def _stand_ins(prompt: Tensor, group: Tensor, episode: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """A sibling's episode and the turn, for every turn that none but one of several siblings has."""
    names, count = (group[episode] + turn).unique(return_counts=True)
    alone = torch.isin(group[episode] + turn, names[count == 1])
    pairs = []
    for e, k in zip(episode[alone].tolist(), turn[alone].tolist(), strict=True):
        siblings = (prompt == prompt[e]).nonzero().flatten()
        pairs += [(int(s), k) for s in siblings[siblings != e][:1]]
    made = torch.tensor(pairs, dtype=torch.long, device=turn.device).reshape(-1, 2)
    return made[:, 0], made[:, 1]


def _joined(traj: Trajectory, episode: Tensor, steps: Tensor) -> Tensor:
    """`[rows, T]` of turns, which share no step -> `[episodes, T]`."""
    return torch.zeros_like(traj.reward).index_add(0, episode, steps.to(traj.reward))
