"""The reward of an environment: what it paid while the episode was played."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from steersman.reward.core import Scores
from steersman.types import Need, Sample, SteersmanError

Per = Literal["turn", "episode"]


class EpisodeReward:
    """Each turn's reward at its last token, or, with `per` "episode", their sum at the episode's end.

    Raises SteersmanError for samples that no environment made.
    """

    model = None
    reads_ids = False

    def __init__(self, name: str, per: Per = "turn") -> None:
        self.name, self.per = name, per

    def score(self, samples: Sequence[Sample]) -> Scores:
        if any(s.turns is None for s in samples):
            raise SteersmanError(f"reward '{self.name}': environment: true, but the samples were made without one")
        paid = torch.zeros(len(samples), max(len(s.ids) for s in samples))
        for row, sample in enumerate(samples):
            for turn in sample.turns or []:
                paid[row, turn.end - 1] += turn.reward
        total = paid.sum(1)
        return Scores(total, {self.name: total}, paid if self.per == "turn" else None)

    def needs(self, rows: Sequence[Mapping[str, Any]]) -> list[Need]:
        return []  # it reads what the environment paid

    def describe(self) -> str:
        return f"what the environment pays, by {self.per}"
