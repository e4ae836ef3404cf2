"""Reward models of single answers: ratings, thumbs, and steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from steersman.data import EncodedSet, Feedback, Rating, Steps, TrainingSet, collate
from steersman.loss.reward import huber, multi_objective, process
from steersman.model import AttributeModel, Meaning, ScalarModel, step_ends
from steersman.objectives.batch import over_answers, scores_of, weight_of
from steersman.objectives.reward_config import EvaluationConfig, RewardModelConfig
from steersman.objectives.reward_pairs import require_loss
from steersman.statistics.estimates import Array, auc, rmse, spearman
from steersman.statistics.reward_report import Report, binary_report, keys, rating_report, subsets
from steersman.train.tally import Tally
from steersman.types import Stats, SteersmanError, send


class RatingReward:
    """The objective: mean squared error over the attributes that an answer was rated on, in deviations of each.

    The head learns numbers of mean 0 and deviation 1; mean and deviation are kept in the model's `meaning`, so
    that it predicts in the data's units. A model that has units already keeps them.
    """

    def __init__(
        self,
        model: ScalarModel | AttributeModel,
        train: TrainingSet[Rating],
        held_out: EncodedSet[Rating] | None,
        config: RewardModelConfig,
        micro_tokens: int,
        names: Sequence[str],
    ) -> None:
        require_loss(config, "rating", ("auto", "squared", "huber"))
        self.module, self.train, self.held_out, self.config, self.micro = model, train, held_out, config, micro_tokens
        self.names = tuple(names)
        self.cost = train.lengths
        self.truth = ratings_of(train, self.names)
        if not model.meaning.scale:
            model.means(units(model.meaning, self.names, self.truth))

    def denominator(self, rows: Sequence[int]) -> float:
        return float(len(rows))

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        tokens = collate([self.train.groups[i][0] for i in rows])
        error = self._errors(self.module.outputs(tokens), self.truth[list(rows)])
        tally.add("loss", error.sum(), len(rows))
        return error.sum() / denominator

    def evaluate(self) -> Stats:
        """Held-out loss, and error and rank correlation of each attribute in the data's units."""
        if self.held_out is None:
            return {}
        truth = ratings_of(self.held_out, self.names)
        outputs = self._outputs(self.held_out)
        said = self._in_units(outputs)
        stats = {"held_out/loss": float(self._errors(outputs.to(self.module.device), truth).mean())}
        for a, name in enumerate(self.names):
            there = truth[:, a].isfinite().numpy()
            x, y = said[there, a], truth[:, a].numpy()[there]
            stats |= {f"held_out/rmse/{name}": rmse(x, y), f"held_out/spearman/{name}": spearman(x, y)}
        return {name: x for name, x in stats.items() if math.isfinite(x)}

    def report(self, config: EvaluationConfig) -> Report | None:
        held = self.held_out
        if held is None:
            return None
        return rating_report(
            self._in_units(self._outputs(held)),
            ratings_of(held, self.names).numpy(),
            self.names,
            usual=self.module.shift.cpu().double().numpy(),
            lengths=np.array([len(e.response) for e in held.first], dtype=float),
            prompts=keys(held.examples),
            subset=subsets(held.examples, config.subset),
            draws=config.draws,
        )

    def _errors(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """The loss of each answer, `[B]`; a missing rating (NaN) counts in none."""
        truth = send(truth.to(outputs.dtype), outputs.device)
        present = truth.isfinite()
        wanted = torch.where(present, (truth - self.module.shift) / self.module.scale, 0.0)
        if self.config.loss != "huber":
            return multi_objective(outputs, wanted, present)
        error = huber(torch.where(present, outputs, 0.0), wanted)
        return error.sum(-1) / present.sum(-1)

    def _outputs(self, data: EncodedSet[Rating]) -> Tensor:
        return over_answers(data.groups, self.micro, self.module.outputs)

    def _in_units(self, outputs: Tensor) -> Array:
        return (outputs * self.module.scale.cpu() + self.module.shift.cpu()).double().numpy()


def ratings_of(data: TrainingSet[Rating], names: Sequence[str]) -> Tensor:
    """Ratings `[N, A]`, NaN where there is none."""
    return torch.tensor([[e.scores.get(name, math.nan) for name in names] for e in data.examples])


def units(meaning: Meaning, names: Sequence[str], truth: Tensor) -> Meaning:
    """Mean and deviation of each attribute; a constant one keeps the deviation 1. Raises SteersmanError for one that
    no row rates."""
    there = [column[column.isfinite()].double() for column in truth.T]
    if unrated := [name for name, x in zip(names, there, strict=True) if not len(x)]:
        raise SteersmanError(f"no training row rates {', '.join(unrated)}; mend data.scores or the files")
    deviation = [float(x.std(correction=0)) for x in there]
    return replace(
        meaning, kind="rating", attributes=tuple(names), shift=tuple(float(x.mean()) for x in there),
        scale=tuple(d if d > 1e-6 else 1.0 for d in deviation),
    )  # fmt: skip


class FeedbackReward:
    """The objective: logistic regression of thumbs, L = -y log sigma(r) - (1 - y) log(1 - sigma(r)).

    The score is the log-odds of a thumb up; a new model starts at the data's own log-odds.
    """

    def __init__(
        self,
        model: ScalarModel,
        train: TrainingSet[Feedback],
        held_out: EncodedSet[Feedback] | None,
        config: RewardModelConfig,
        micro_tokens: int,
    ) -> None:
        require_loss(config, "feedback", ("auto",))
        self.module, self.train, self.held_out, self.config, self.micro = model, train, held_out, config, micro_tokens
        self.base = float(train.values("label").mean())
        if not model.meaning.scale:
            model.means(Meaning(kind="feedback", shift=(log_odds(self.base),), scale=(1.0,)))

    @property
    def cost(self) -> np.ndarray:
        """Tokens of each answer with its prompt; of a stream, of those in its buffer."""
        return self.train.lengths

    def denominator(self, rows: Sequence[int]) -> float:
        return weight_of(self.train.examples, rows)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        tokens = collate([self.train.groups[i][0] for i in rows])
        score = self.module.score(tokens)
        examples = [self.train.examples[i] for i in rows]
        numbers = torch.tensor([[float(e.label) for e in examples], [e.weight for e in examples]], dtype=score.dtype)
        label, weight = send(numbers, score.device)
        per_row = cross_entropy(score, label, reduction="none") + self.config.centre * score**2
        tally.add("loss", (weight * per_row).sum(), float(numbers[1].sum()))
        tally.add("accuracy", ((score > 0) == (label > 0.5)).float().sum(), len(rows))
        return (weight * per_row).sum() / denominator

    def evaluate(self) -> Stats:
        if self.held_out is None:
            return {}
        score = scores_of(self.module, self.held_out.groups, self.micro)
        return _binary_stats(score, torch.tensor([float(e.label) for e in self.held_out.examples]))

    def report(self, config: EvaluationConfig) -> Report | None:
        held = self.held_out
        if held is None:
            return None
        return binary_report(
            scores_of(self.module, held.groups, self.micro).double().numpy(),
            np.array([float(e.label) for e in held.examples]),
            base=self.base,
            lengths=np.array([len(e.response) for e in held.first], dtype=float),
            clusters=keys(held.examples),
            subset=subsets(held.examples, config.subset),
            draws=config.draws,
        )


class StepReward:
    """The objective: cross-entropy of "right so far" at the last token of each step, mean over steps.

    Where a step ends is found in the token ids alone (`model.step_ends`), as it will be in rollouts.

    Raises SteersmanError where an answer's ids do not end as many steps as it has labels.
    """

    def __init__(
        self,
        model: ScalarModel,
        train: TrainingSet[Steps],
        held_out: EncodedSet[Steps] | None,
        config: RewardModelConfig,
        micro_tokens: int,
    ) -> None:
        require_loss(config, "steps", ("auto",))
        self.module, self.train, self.held_out, self.config, self.micro = model, train, held_out, config, micro_tokens
        self.cost = train.lengths
        self.places = places(train, model.tokenizer)
        self.held_places = places(held_out, model.tokenizer) if held_out is not None else []
        self.base = float(np.mean([x for e in train.examples for x in e.labels]))
        if not model.meaning.scale:
            separator = train.examples[0].separator
            model.means(Meaning(kind="steps", shift=(log_odds(self.base),), scale=(1.0,), separator=separator))

    def denominator(self, rows: Sequence[int]) -> float:
        return float(sum(len(self.train.examples[i].labels) for i in rows))

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        tokens = collate([self.train.groups[i][0] for i in rows])
        logit = self.module.value(tokens)[:, 1:]  # column t: the state after response token t
        label, ends = torch.zeros(logit.shape, dtype=logit.dtype), torch.zeros(logit.shape, dtype=torch.bool)
        for row, i in enumerate(rows):
            ends[row, self.places[i]] = True
            label[row, self.places[i]] = label.new_tensor(self.train.examples[i].labels)
        count, label, ends = int(ends.sum()), send(label, logit.device), send(ends, logit.device)
        total = process(logit, label, ends).sum()
        tally.add("loss", total, count)
        tally.add("accuracy", (((logit > 0) == (label > 0.5)) & ends).float().sum(), count)
        return total / denominator

    def evaluate(self) -> Stats:
        if self.held_out is None:
            return {}
        logit, label, _ = self._held()
        return _binary_stats(logit, label)

    def report(self, config: EvaluationConfig) -> Report | None:
        held = self.held_out
        if held is None:
            return None
        logit, label, owner = self._held()
        named = subsets(held.examples, config.subset)
        report = binary_report(
            logit.double().numpy(),
            label.double().numpy(),
            base=self.base,
            lengths=np.concatenate([np.diff([-1, *at]) for at in self.held_places]).astype(float),
            clusters=owner.numpy(),
            subset=[named[i] for i in owner.tolist()] if named else (),
            draws=config.draws,
        )
        report.kind = "steps"
        return report

    def _held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logit and label of every held-out step, and the answer it belongs to."""
        assert self.held_out is not None
        width = max(len(e.response) for e in self.held_out.first)

        def run(tokens: Any) -> Tensor:
            value = self.module.value(tokens)[:, 1:]
            return torch.nn.functional.pad(value, (0, width - value.shape[1]))

        value = over_answers(self.held_out.groups, self.micro, run)
        logit = torch.cat([value[i, at] for i, at in enumerate(self.held_places)])
        label = torch.tensor([x for e in self.held_out.examples for x in e.labels])
        counts = torch.tensor([len(at) for at in self.held_places])
        return logit, label, torch.repeat_interleave(torch.arange(len(counts)), counts)


def places(data: TrainingSet[Steps], tokenizer: Any) -> list[list[int]]:
    """The response tokens that end each step, for every answer."""
    out = []
    for (encoded,), example in zip(data.groups, data.examples, strict=True):
        counts = max((t + 1 for t, m in enumerate(encoded.mask) if m), default=0)
        ends = step_ends(tokenizer, encoded.response[:counts], example.separator)
        if len(ends) != len(example.labels):
            raise example.row.fault(
                "step labels do not match steps",
                f"{len(example.labels)} labels, but its tokens end {len(ends)} steps; was it cut (data.on_too_long: "
                f"drop leaves such rows out), or can the tokenizer not write {example.separator!r}?",
                "labels",
            )
        out.append(ends)
    return out


def log_odds(share: float) -> float:
    """log(p / (1 - p)), with p kept away from 0 and 1."""
    share = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(share / (1 - share))


def _binary_stats(logit: Tensor, label: Tensor) -> Stats:
    stats = {
        "held_out/loss": float(cross_entropy(logit, label)),
        "held_out/accuracy": float(((logit > 0) == (label > 0.5)).float().mean()),
        "held_out/auc": auc(logit.numpy(), label.numpy()),
    }
    return {name: x for name, x in stats.items() if math.isfinite(x)}
