"""Episodes in segments, where the template rewrote the history: one row of experience, several rows for a model.

An episode's steps stand one behind the other in its `Trajectory`, whichever prompt each follows, so returns,
advantages, baselines and losses are those of the episode. A model reads every segment after its own prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steersman.ops.masked import last_step
from steersman.train.policy_update import Learner, Values
from steersman.types import Sample, Segment, Tokens, Trajectory, send


class SegmentRows:
    """Which part of which episode each row holds that a model reads; nothing changes where no sample has several.

    `split` and `join` take steps from one order to the other; with `after` 1 there is one column more than steps, the
    state behind the last one. `owner` [rows] is the episode of each row, `leads` says which are an episode's first.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.apart = any(len(s.segments or ()) > 1 for s in samples)
        self.parts: list[tuple[int, Segment]] = []
        for b, s in enumerate(samples):
            self.parts += [(b, part) for part in s.segments or [Segment(s.prompt.ids, 0, len(s.ids))]]
        self.owner = torch.tensor([b for b, _ in self.parts])
        self.begin = torch.tensor([part.begin for _, part in self.parts])
        self.leads = self.owner.diff(prepend=self.owner.new_tensor([-1])) > 0
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

    def split(self, x: Tensor) -> Tensor:
        """`[episodes, T]` -> `[rows, T of the longest]`."""
        if not self.apart:
            return x
        out = x.new_zeros(len(self.parts), max(part.end - part.begin for _, part in self.parts))
        for row, (b, part) in enumerate(self.parts):
            out[row, : part.end - part.begin] = x[b, part.begin : part.end]
        return out

    def rows_of(self, episodes: Tensor) -> Tensor:
        """The numbers of all rows of these episodes."""
        return torch.isin(self.owner, episodes).nonzero().flatten()

    def put(self, x: Tensor, mask: Tensor, rows: Tensor, into: Tensor) -> Tensor:
        """`into` `[episodes, T]` with what a model read of some of their rows, `x` `[rows, T]`, at the steps that
        count, which `mask` marks. The episodes are those of the rows, in order. Gradients reach `x`."""
        _, place = self.owner[rows].unique(return_inverse=True)
        row, column = (send(at, x.device) for at in mask.nonzero().unbind(1))
        place, begin = send(place, x.device), send(self.begin[rows], x.device)
        return into.index_put((place[row], begin[row] + column), x[row, column])

    def values(self, learner: Learner, tokens: Tokens, traj: Trajectory) -> Values:
        """The critic's values `[episodes, T + 1]`.

        After the last step of an episode that bootstraps stands the value of the context of its next turn,
        `Sample.onward`: that is a state in which a turn begins, and on such states a critic is trained. In the state
        right after a reply no turn begins.
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
