"""The second stage of a model of several attributes: mixing them by the prompt, learned from preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steersman.data import EncodedSet, Preference
from steersman.loss.reward import pairwise
from steersman.model import AttributeModel, Gating
from steersman.model.attributes import verbosity
from steersman.objectives.batch import over_answers, right, weight_of
from steersman.objectives.reward_config import EvaluationConfig, GatingConfig, RewardModelConfig
from steersman.objectives.reward_pairs import require_loss, share
from steersman.statistics.estimates import Array, bootstrap, mean, pearson, spearman, wilson
from steersman.statistics.reward_report import Report, keys, pair_report, subsets
from steersman.train.tally import Tally
from steersman.types import Stats, SteersmanError


@dataclass(slots=True)
class Features:
    """What the frozen model says of pairs: `prompt` [N, H], `numbers` [N, 2, A], `verbose` [N, 2]."""

    prompt: Tensor
    numbers: Tensor
    verbose: Tensor


class GatingReward:
    """The objective: Bradley-Terry loss of gated scores, trunk and heads frozen and run once.

    The correction is fitted first, over the training pairs' answers. Source: arXiv 2406.12845, section 2.2.
    """

    def __init__(
        self,
        model: AttributeModel,
        train: EncodedSet[Preference],
        held_out: EncodedSet[Preference] | None,
        config: RewardModelConfig,
        gating: GatingConfig,
        micro_tokens: int,
    ) -> None:
        require_loss(config, "preference", ("auto", "pairs"))
        self.names = model.meaning.attributes
        if gating.verbosity not in ("length", "none", *self.names):
            raise SteersmanError(
                f"gating.verbosity: {gating.verbosity!r} is no attribute of the model; give length, none, or one of "
                f"{', '.join(self.names)}"
            )
        self.model, self.train, self.held_out, self.config = model, train, held_out, config
        self.cost = [1] * len(train.groups)
        self.features = features(model, train, gating.verbosity, micro_tokens)
        self.held = features(model, held_out, gating.verbosity, micro_tokens) if held_out is not None else None
        self.module = Gating(self.features.prompt.shape[1], len(self.names), gating.hidden, gating.layers)
        self._fit_buffers(gating)

    def _fit_buffers(self, gating: GatingConfig) -> None:
        """Prompts' mean and deviation, verbosity's, and the penalties that take its correlation away."""
        module, seen = self.module, self.features
        module.mean.copy_(seen.prompt.mean(0))
        module.deviation.copy_(seen.prompt.std(0, correction=0).clamp(min=1e-6))
        verbose = seen.verbose.double().flatten()
        module.verbosity_units.copy_(torch.stack([verbose.mean(), verbose.std(correction=0).clamp(min=1e-6)]))
        if gating.verbosity == "none":
            return
        centre, deviation = module.verbosity_units.double()
        v = ((verbose - centre) / deviation).numpy()
        numbers = seen.numbers.double().flatten(0, 1).numpy()
        found = [penalty(numbers[:, a], v, gating.correlation) for a in range(len(self.names))]
        module.penalty.copy_(torch.tensor(found))

    def denominator(self, rows: Sequence[int]) -> float:
        return weight_of(self.train.examples, rows)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        scores = self.scores(self.features, list(rows))
        target = torch.tensor([self.train.examples[i].agreement for i in rows])
        weight = torch.tensor([self.train.examples[i].weight for i in rows])
        per_pair = pairwise(scores[:, 0], scores[:, 1], target=target)
        tally.add("loss", (weight * per_pair).sum(), float(weight.sum()))
        tally.add("accuracy", right(scores[:, 0] - scores[:, 1], target).sum(), int((target != 0.5).sum()))
        return (weight * per_pair).sum() / denominator

    def scores(self, data: Features, rows: list[int] | slice) -> Tensor:
        """Gated scores of both answers, `[B, 2]`."""
        prompt = data.prompt[rows]
        both = [self.module(prompt, data.numbers[rows, k], data.verbose[rows, k]) for k in (0, 1)]
        return torch.stack(both, 1)

    @torch.no_grad()
    def evaluate(self) -> Stats:
        if self.held is None or self.held_out is None:
            return {}
        scores = self.scores(self.held, slice(None))
        target = torch.tensor([e.agreement for e in self.held_out.examples])
        lead = scores[:, 0] - scores[:, 1]
        weights = self.module.weights(self.held.prompt).mean(0).tolist()
        return {
            "held_out/loss": float(pairwise(scores[:, 0], scores[:, 1], target=target).mean()),
            "held_out/accuracy": share(right(lead, target)[target != 0.5]),
            **{f"held_out/weight/{name}": w for name, w in zip(self.names, weights, strict=True)},
        }

    @torch.no_grad()
    def report(self, config: EvaluationConfig) -> Report | None:
        """The gated score, beside each attribute alone, their mean, and the difference to the best single one."""
        if self.held is None or self.held_out is None:
            return None
        held, examples = self.held, self.held_out.examples
        target, prompts = np.array([e.agreement for e in examples]), keys(examples)
        lengths = np.array([[len(e.response) for e in group] for group in self.held_out.groups])
        gated = self.scores(held, slice(None)).double().numpy()
        report = pair_report(
            gated[:, 0] - gated[:, 1], target, lengths=lengths, scores=gated, votes=[e.votes for e in examples],
            prompts=prompts, subset=subsets(examples, config.subset), draws=config.draws,
        )  # fmt: skip
        report.kind = "gating"
        corrected = self.module.corrected(held.numbers, held.verbose).double().numpy()
        raw = held.numbers.double().numpy()
        singles = {f"{name} alone": raw[..., a] for a, name in enumerate(self.names)}
        others = singles | {"mean of attributes": raw.mean(-1), "mean of corrected attributes": corrected.mean(-1)}
        hits = {name: _hits(x, target) for name, x in others.items()}
        for name, hit in hits.items():
            report.numbers[f"accuracy/{name}"] = wilson(float(hit.sum()), len(hit))
        best = max(singles, key=lambda name: mean(hits[name]))
        ahead = _hits(gated, target) - hits[best]
        clusters = prompts[target != 0.5]
        report.numbers[f"gated less {best}"] = bootstrap(mean, [ahead], clusters=clusters, draws=config.draws)
        for a, name in enumerate(self.names):
            report.length[f"{name}/spearman_before_correction"] = spearman(raw[..., a].ravel(), lengths.ravel())
            report.length[f"{name}/spearman_after_correction"] = spearman(corrected[..., a].ravel(), lengths.ravel())
        return report


def _hits(scores: Array, target: Array) -> Array:
    lead = (scores[:, 0] - scores[:, 1])[target != 0.5]
    return np.where(lead == 0, 0.5, (lead > 0) == (target[target != 0.5] > 0.5)).astype(float)


def features(model: AttributeModel, data: EncodedSet[Preference], kind: str, micro_tokens: int) -> Features:
    """Everything that gating reads of every pair, from one run of the frozen model over all answers."""
    A = len(model.meaning.attributes)

    def run(tokens):
        numbers, prompt = model.with_prompt(tokens)
        return torch.cat([numbers, verbosity(kind, model.meaning.attributes, tokens, numbers)[:, None], prompt], 1)

    found = over_answers(data.groups, micro_tokens, run).view(len(data.groups), 2, -1)
    return Features(found[:, 0, A + 1 :], found[..., :A], found[..., A])


def penalty(number: Array, verbose: Array, correlation: str) -> float:
    """lambda such that r - lambda v has no correlation with v; 0 where v does not vary.

    Pearson's is the regression coefficient. Spearman's falls as lambda grows (every pair of answers moves against
    v or not at all), so it is found by bisection, up to the step that a finite set leaves.

    Source: arXiv 2406.12845, section 2.2.
    """
    if np.ptp(verbose) == 0 or np.ptp(number) == 0:
        return 0.0
    slope = pearson(number, verbose) * number.std() / verbose.std()
    if correlation == "pearson":
        return float(slope)
    width = 4 * number.std() / verbose.std()
    low, high = slope - width, slope + width
    for _ in range(60):
        middle = (low + high) / 2
        if spearman(number - middle * verbose, verbose) > 0:
            low = middle
        else:
            high = middle
    return float((low + high) / 2)
