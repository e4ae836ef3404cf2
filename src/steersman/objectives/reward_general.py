"""Preferences that no score explains, on pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steersman.data import EncodedSet, Preference
from steersman.loss.reward import pairwise
from steersman.model import GeneralPreferenceModel
from steersman.objectives.batch import over_answers
from steersman.objectives.reward_config import EvaluationConfig
from steersman.objectives.reward_pairs import PairwiseReward, longer_lead, told_of_leads
from steersman.statistics.reward_report import Report, keys, pair_report, subsets
from steersman.types import Stats, Tokens


class GeneralPreferenceReward(PairwiseReward[GeneralPreferenceModel]):
    """The objective: -log sigma(s(y_w, y_l)) with s the model's skew-symmetric lead.

    Source: arXiv 2410.02197. `train.centre` has no meaning here: there is no level to hold.
    """

    def per_pair(self, tokens: Tokens, examples: Sequence[Preference]) -> tuple[Tensor, Tensor]:
        lead = self.module.leads(*self.module.outputs(tokens).chunk(2))
        target, margin = self.labels(examples, lead)
        return pairwise(lead, torch.zeros_like(lead), target=target, margin=margin), lead

    def evaluate(self) -> Stats:
        held = self.held_out
        if held is None:
            return {}
        lead = self._leads(held)
        target, margin = self.labels(held.examples, lead)
        loss = pairwise(lead, torch.zeros_like(lead), target=target, margin=margin)
        return {"held_out/loss": float(loss.mean()), **told_of_leads(lead, longer_lead(held.groups), target)}

    def report(self, config: EvaluationConfig) -> Report | None:
        held = self.held_out
        if held is None:
            return None
        lead = self._leads(held).double().numpy()
        return pair_report(
            lead,
            np.array([e.agreement for e in held.examples]),
            lengths=np.array([[len(e.response) for e in group] for group in held.groups]),
            scores=np.stack([lead, -lead], 1),
            votes=[e.votes for e in held.examples],
            prompts=keys(held.examples),
            subset=subsets(held.examples, config.subset),
            draws=config.draws,
        )

    def _leads(self, data: EncodedSet[Preference]) -> Tensor:
        embedded = over_answers(data.groups, self.micro, self.module.outputs)
        return self.module.leads(*embedded.view(len(data.groups), 2, -1).unbind(1))
