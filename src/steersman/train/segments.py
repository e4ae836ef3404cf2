"""Episodes whose history was shown anew: one row of experience, several rows that a model reads.

An episode's steps stand one behind the other in its `Trajectory`, whichever prompt each was said behind, so returns,
advantages and baselines are those of the episode. A model reads every segment behind its own prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.ops.masked import last_step
from steersman.train.policy_update import Learner, Values
from steersman.types import Sample, Segment, Tokens, Trajectory


class SegmentRows:
    """Which part of which episode each row holds that a model reads; nothing changes where no sample has several.

    `split` and `join` take steps from one order to the other; with `after` 1 there is one column more than steps, the
    state behind the last one.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.apart = any(len(s.segments or ()) > 1 for s in samples)
        self.parts: list[tuple[int, Segment]] = []
        for b, s in enumerate(samples):
            self.parts += [(b, part) for part in s.segments or [Segment(s.prompt.ids, 0, len(s.ids))]]
        self.onward = [s.onward for s in samples]

    def tokens(self, whole: Tokens) -> Tokens:
        """What a model reads of episodes that `tokens_of` made one row each."""
        if not self.apart:
            return whole
        rows = [(b, part, slice(part.begin, part.end)) for b, part in self.parts]
        support = None if whole.support is None else [whole.support[b][at] for b, _, at in rows]
        return Tokens.from_ids(
            [part.prompt for _, part, _ in rows],
            [whole.response[b, at].tolist() for b, _, at in rows],
            [whole.mask[b, at].tolist() for b, _, at in rows],
            support,
        ).to(whole.response.device)

    def join(self, x: Tensor, width: int, after: int = 0) -> Tensor:
        """`[rows, T]` of what a model read -> `[episodes, width]`."""
        if not self.apart:
            return x
        out = x.new_zeros(self.parts[-1][0] + 1, width)
        for row, (b, part) in enumerate(self.parts):
            out[b, part.begin : part.end + after] = x[row, : part.end - part.begin + after]
        return out

    def split(self, x: Tensor, after: int = 0) -> Tensor:
        """`[episodes, T]` -> `[rows, T of the longest]`."""
        if not self.apart:
            return x
        out = x.new_zeros(len(self.parts), max(part.end - part.begin for _, part in self.parts) + after)
        for row, (b, part) in enumerate(self.parts):
            out[row, : part.end - part.begin + after] = x[b, part.begin : part.end + after]
        return out

    def values(self, learner: Learner, tokens: Tokens, traj: Trajectory) -> Values:
        """The critic's values `[episodes, T + 1]`.

        Behind an episode that bootstraps stands V of what its next turn would have been said behind, `Sample.onward`:
        there turns begin, and of such states a critic learns. Right behind a reply nobody ever speaks.
        """
        last = last_step(traj.mask)
        goes_on = traj.discount.gather(1, last.clamp(min=0)[:, None])[:, 0] != 0
        onward = {b: ids for b, ids in enumerate(self.onward) if ids is not None and goes_on[b]}
        value, loss = learner.value(self.tokens(tokens), traj, at_once=not (self.apart or onward))
        if value is None:
            return Values(None)
        value = self.join(value, tokens.mask.shape[1] + 1, after=1)
        if onward:
            read = Tokens.from_ids([*onward.values()], [ids[-1:] for ids in onward.values()])  # one token stands in
            rows = torch.tensor([*onward], device=value.device)
            value[rows, last[rows] + 1] = learner.read_values(read)[:, 0].to(value)
        return Values(value, loss)

    def experience(self, traj: Trajectory, advantage: Advantage) -> tuple[Trajectory, Advantage]:
        """The same steps in the rows that a model reads."""
        if not self.apart:
            return traj, advantage
        owner = torch.tensor([b for b, _ in self.parts], device=traj.mask.device)
        by_step = {"mask", "reward", "discount", "logp_old", "logp_ref", "logp_rollout", "penalty_mask", "turn"}
        parts = {}
        for field in fields(traj):
            x = getattr(traj, field.name)
            if x is not None and field.name == "value":
                parts["value"] = self.split(x, after=1)
            elif x is not None:
                parts[field.name] = self.split(x) if field.name in by_step else x[owner]
        ret = None if advantage.ret is None else self.split(advantage.ret)
        return replace(traj, **parts), Advantage(self.split(advantage.adv), ret)
