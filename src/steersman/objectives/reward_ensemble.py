"""Several heads on one trunk, each trained on draws of its own of the same pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steersman.data import EncodedSet, Preference, TrainingSet, collate_pairs
from steersman.loss.reward import centring, pairwise
from steersman.model import EnsembleModel
from steersman.objectives.batch import majority, over_answers, right
from steersman.objectives.reward_config import RewardModelConfig
from steersman.objectives.reward_pairs import PairwiseReward
from steersman.train.tally import Tally
from steersman.types import Stats, send


class EnsembleReward(PairwiseReward[EnsembleModel]):
    """The objective: the mean over heads of the Bradley-Terry loss, each pair counted for a head as often as a draw
    with replacement would have it: a Poisson number of mean 1, drawn once per pair and head.

    Accuracy and scores are those of the heads' mean; `held_out/disagreement` is their deviation in what a pair's
    answers differ by.
    """

    def __init__(
        self,
        model: EnsembleModel,
        train: TrainingSet[Preference],
        held_out: EncodedSet[Preference] | None,
        config: RewardModelConfig,
        micro_tokens: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(model, train, held_out, config, micro_tokens)
        self.bootstrap_counts = torch.poisson(torch.ones(len(train.groups), config.heads), generator=generator)

    def _weights(self, rows: Sequence[int]) -> Tensor:
        weight = torch.tensor([self.train.examples[i].weight for i in rows])
        return weight[:, None] * self.bootstrap_counts[list(rows)]

    def denominator(self, rows: Sequence[int]) -> float:
        return max(float(self._weights(rows).mean(1).sum()), 1e-12)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        tokens = collate_pairs([self.train.groups[i] for i in rows])
        chosen, rejected = self.module.outputs(tokens).chunk(2)
        examples, heads = [self.train.examples[i] for i in rows], chosen.shape[1]
        (target, margin), weights = self.labels(examples, chosen), self._weights(rows)
        wide = [x[:, None].expand(-1, heads).flatten() for x in (target, margin)]
        per_pair = pairwise(chosen.flatten(), rejected.flatten(), target=wide[0], margin=wide[1])
        per_pair = per_pair + self.config.centre * centring(chosen.flatten(), rejected.flatten())
        weight = send(weights.to(per_pair.dtype), per_pair.device).flatten() / heads
        lead = (chosen - rejected).mean(1)
        tally.add("loss", (weight * per_pair).sum(), float(weights.mean(1).sum()))
        decided = sum(e.agreement != 0.5 for e in examples)
        tally.add("accuracy", right(lead, target).sum(), decided)
        tally.add("margin", (lead * majority(target)).sum(), decided)
        return (weight * per_pair).sum() / denominator

    def evaluate(self) -> Stats:
        told, held = super().evaluate(), self.held_out
        if held is None:
            return told
        heads = over_answers(held.groups, self.micro, self.module.outputs).view(len(held.groups), 2, -1)
        return told | {"held_out/disagreement": float((heads[:, 0] - heads[:, 1]).std(-1, correction=0).mean())}
