"""A moving average of the student's weights, for a teacher that moves with the student and lags behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steersman.distill.recipe import DistillRecipe
from steersman.distributed.ranks import ranks
from steersman.model import Policy, as_local_shards, frozen_copy
from steersman.setup.models import policy_from
from steersman.train.offline import put_back, trainable
from steersman.train.session import kept_state


class MovingAverage:
    """The weights phi of a frozen copy, which follow the student's theta:

        phi <- decay phi + (1 - decay) theta        after every `every`-th update

    Averaged is what is trained: of low-rank adapters their two factors, each by itself. Half precision would lose
    steps as small as 1 - decay of a difference, so there the average is kept in float32 (`wide`) and rounded into the
    copy.

    Source: arXiv 2601.19897, algorithm 1, whose alpha is 1 - decay.
    """

    def __init__(self, copy: Policy, student: Policy, *, decay: float, every: int) -> None:
        self.copy, self.student, self.decay, self.every = copy, student, decay, every
        half = [p for p in self._weights().values() if p.element_size() < 4]
        self.wide = nn.ParameterList(nn.Parameter(p.float(), requires_grad=False) for p in half)

    @torch.no_grad()
    def follow(self, done: int) -> None:
        """Refreshes the average where one is due after `done` updates."""
        if done % self.every:
            return
        theta = trainable(self.student)
        for name, phi in self._means().items():
            phi.lerp_(theta[name].to(phi.dtype), 1 - self.decay)
        self._round()

    def state_dict(self) -> dict[str, Tensor]:
        return kept_state(self._means())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        put_back(self._means(), state)
        self._round()

    def _weights(self) -> dict[str, Tensor]:
        """The copy's weights that the student trains, by name."""
        trained = trainable(self.student)
        as_local_shards(self.copy)
        return {name: p for name, p in self.copy.named_parameters() if name in trained}

    def _means(self) -> dict[str, Tensor]:
        wide = iter(self.wide)
        return {name: next(wide) if p.element_size() < 4 else p for name, p in self._weights().items()}

    @torch.no_grad()
    def _round(self) -> None:
        for phi, p in zip(self._means().values(), self._weights().values(), strict=True):
            if phi is not p:
                p.copy_(phi)


def frozen_student(recipe: DistillRecipe, student: Policy) -> Policy:
    """A frozen copy of the student as it is: with adapters on the student's own base, unless that lies in pieces."""
    if not ranks().sharded:
        return frozen_copy(student)
    copy = policy_from(recipe.model, recipe.run, student.device).requires_grad_(False)
    trained = trainable(student)
    put_back({name: p for name, p in copy.named_parameters() if name in trained}, trained)
    return copy
