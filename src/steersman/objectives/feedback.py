"""The objectives of KTO, APO and BCO: the loss of single answers with a thumb up or down.

What a method measures over a whole batch before its update (KTO's reference point, BCO's reward shift) does not
depend on its micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from steersman.config.sections import Section
from steersman.data import Encoded, EncodedSet, Feedback, TrainingSet, collate
from steersman.distributed.micro import in_order, my_micro_batches
from steersman.loss.feedback import apo_zero_unpaired, auto_weights, bco, kto, kto_reference_point
from steersman.model import Policy, context_length
from steersman.model.layout import masked_indices
from steersman.objectives.batch import right, rounding, weight_of
from steersman.run.progress import with_progress
from steersman.setup.reference import Readings, Reference, answer_logp, answer_logp_now
from steersman.statistics.estimates import auc
from steersman.train.reference_looks import ReferenceLooks
from steersman.train.tally import Tally
from steersman.types import Stats, send


class KTOConfig(Section):
    """The numbers of Kahneman-Tversky optimisation, and of APO-zero, which differs in its reference point."""

    name: Literal["kto", "apo_zero_unpaired"] = Field(
        default="kto",
        description="kto: gains and losses are relative to an estimate of how far the policy is from the reference; "
        "apo_zero_unpaired: relative to the reference itself",
    )
    beta: float = Field(default=0.1, gt=0, description="how fast a gain or loss saturates; the KL penalty's strength")
    desirable_weight: float | Literal["auto"] = Field(
        default="auto",
        description="weight of liked answers (lambda_D). auto: 1, and more for the rarer label, so that liked and "
        "disliked answers count alike in all",
    )
    undesirable_weight: float | Literal["auto"] = Field(
        default="auto",
        description="weight of disliked answers (lambda_U); auto as above. The paper advises lambda_D n_D / "
        "(lambda_U n_U) in [1, 1.5], n answers of each",
    )
    nll: float = Field(
        default=0.0, ge=0, description="weight of the liked answers' mean negative log-likelihood, added to the loss"
    )

    @model_validator(mode="after")
    def _positive(self) -> KTOConfig:
        for name in ("desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if value != "auto" and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0, or auto")
        return self

    @property
    def mismatches(self) -> bool:
        """Whether it compares with what the policy says to other prompts of the batch."""
        return self.name == "kto"

    @property
    def counts_labels(self) -> bool:
        """Whether its weights follow from how many answers there are of each label."""
        return "auto" in (self.desirable_weight, self.undesirable_weight)

    def label_weights(self, ups: int, downs: int) -> tuple[float, float]:
        """lambda_D and lambda_U of so many answers of each label."""
        auto, up, down = auto_weights(ups, downs), self.desirable_weight, self.undesirable_weight
        return auto[0] if up == "auto" else up, auto[1] if down == "auto" else down

    def answer_losses(
        self, logp: Tensor, ref: Tensor, label: Tensor, threshold: Tensor, weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, implicit rewards, and their leads over the reference point, all `[B]`."""
        numbers = {"beta": self.beta, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
        if self.name == "kto":
            loss, explain = kto(logp, ref, label, threshold, **numbers)
        else:
            loss, explain = apo_zero_unpaired(logp, ref, label, **numbers)
        return loss, explain["reward"], explain["reward"] - self.beta * threshold

    def next_shift(self, means: dict[bool, float], stats: Stats) -> float | None:
        """None: its threshold is each batch's own reference point, or 0."""
        return None


class BCOConfig(Section):
    """Binary classifier optimisation's own numbers."""

    mismatches: ClassVar[bool] = False
    counts_labels: ClassVar[bool] = False

    name: Literal["bco"] = Field(default="bco", description="the loss, fixed by the verb")
    beta: float = Field(default=0.1, gt=0, description="scale of the implicit reward; the KL penalty's strength")
    shift_decay: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="decay of the reward shift's moving average: the share of itself that it keeps per batch",
    )
    nll: float = Field(
        default=0.0, ge=0, description="weight of the liked answers' mean negative log-likelihood, added to the loss"
    )

    def label_weights(self, ups: int, downs: int) -> tuple[float, float]:
        """Both labels count once."""
        return 1.0, 1.0

    def answer_losses(
        self, logp: Tensor, ref: Tensor, label: Tensor, threshold: Tensor, weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, implicit rewards, and their leads over the shift, all `[B]`."""
        loss, explain = bco(logp, ref, label, threshold, beta=self.beta)
        return loss, explain["reward"], explain["reward"] - threshold

    def next_shift(self, means: dict[bool, float], stats: Stats) -> float | None:
        """The shift for the next batch: half-way between the labels' moving mean rewards, this batch's included."""
        for label, mean in ((True, "reward/liked"), (False, "reward/disliked")):
            if mean in stats:
                means[label] = self.shift_decay * means[label] + (1 - self.shift_decay) * stats[mean]
        return sum(means.values()) / 2


class FeedbackObjective:
    """The objective: the mean loss of single answers, each weighed by its label's lambda and its row's weight.

    `threshold` (nats for KTO's reference point, reward units for BCO's shift) is what an answer's implicit reward
    is compared with; `look` sets it before an update, `update_threshold` learns from the update's own batch.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference,
        train: TrainingSet[Feedback],
        held_out: EncodedSet[Feedback] | None,
        config: KTOConfig | BCOConfig,
        micro_tokens: int,
        looks: ReferenceLooks | None = None,
    ) -> None:
        self.module, self.reference, self.train, self.held_out = policy, reference, train, held_out
        self.config, self.micro_tokens, self.looks = config, micro_tokens, looks
        self.context = context_length(policy.model)
        self.readings = Readings([(reference, 1.0)], micro_tokens)
        self.reference_logp: dict[int, Tensor] = {}
        self.threshold = 0.0
        self.means = {True: 0.0, False: 0.0}  # of the implicit reward by label: 0 while the policy is the reference
        ups = int(train.values("label").sum())
        self.weights = config.label_weights(ups, len(train.examples) - ups)

    def read_reference(self, rows: Sequence[int]) -> None:
        """Reads what the reference says of the training answers `rows` and of the held-out ones, before the first
        `loss` or `evaluate`. Where that was not asked for, and of answers that are streamed, it is read batch by
        batch."""
        found = self.readings.of_data(self.train, self.held_out, rows)
        self.reference_logp = {key: logp[:, 0] for key, logp in found.items()}

    @property
    def cost(self) -> np.ndarray:
        """Tokens of each answer with its prompt; of a stream, of those in its buffer."""
        return self.train.lengths

    def look(self, rows: Sequence[int]) -> None:
        """What the whole batch says before its update: KTO's reference point."""
        if self.config.mismatches:
            pairs = mismatched(self.train, rows, self.context)
            if pairs:
                own, ref = (answer_logp(m, pairs, self.micro_tokens) for m in (self.module, self.reference))
                self.threshold = float(kto_reference_point(own, ref))

    def update_threshold(self, stats: Stats) -> None:
        """What a method's threshold learns from a batch: BCO's shift for the next one."""
        shift = self.config.next_shift(self.means, stats)
        self.threshold = self.threshold if shift is None else shift

    def denominator(self, rows: Sequence[int]) -> float:
        return weight_of(self.train.examples, rows)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        loss, told = self._run(self.train, rows)
        label = self._labels(self.train, rows)
        weights = torch.tensor([self.train.examples[i].weight for i in rows], dtype=loss.dtype)
        weight = send(weights, loss.device)
        tally.add("loss", (weight * loss).sum(), float(weights.sum()))
        _add(tally, "", label, told)
        return (weight * loss).sum() / denominator

    @torch.no_grad()
    def evaluate(self) -> Stats:
        """The same numbers on held-out answers, how often a liked one outranks a disliked one, and held prompts."""
        stats = {"threshold": self.threshold} | ({} if self.looks is None else self.looks.look())
        if self.held_out is None:
            return stats
        tally, found, cost = Tally(), [], torch.tensor(self.held_out.lengths)
        for part in with_progress(my_micro_batches(cost, self.micro_tokens), "look at held-out answers"):
            rows = part.rows.tolist()
            loss, told = self._run(self.held_out, rows)
            if part.counts:
                tally.add("held_out/loss", loss.sum(), len(rows))
                _add(tally, "held_out/", self._labels(self.held_out, rows), told)
                found.append((part.rows, told["reward"].float()))
        rewards = in_order(found)
        label = torch.tensor([e.label for e in self.held_out.examples])
        if label.any() and not label.all():
            stats["held_out/auc"] = auc(rewards.numpy(), label.numpy())
        return stats | tally.means()

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "means": dict(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold, self.means = state["threshold"], dict(state["means"])

    def _run(self, data: TrainingSet[Feedback], rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = collate([data.groups[i][0] for i in rows])
        if id(data) in self.reference_logp:
            ref = self.reference_logp[id(data)][list(rows)]
        else:
            ref = answer_logp_now([(self.reference, 1.0)], tokens)
        per_token = self.module.logp_from(tokens, self.module.hidden(tokens)).logp
        mask = send(tokens.mask, per_token.device)
        logp = torch.where(mask, per_token, torch.zeros_like(per_token)).sum(-1)
        ref = send(ref, logp.device)
        label, threshold = send(self._labels(data, rows), logp.device), torch.full_like(logp[0], self.threshold)
        loss, reward, lead = self.config.answer_losses(logp, ref, label, threshold, self.weights)
        if self.config.nll:
            loss = loss - self.config.nll * torch.where(label, logp / mask.sum(-1).clamp(min=1), 0.0)
        told = {
            "accuracy": right(torch.where(label, lead, -lead), tie=rounding(logp.detach())),
            "logp": logp.detach(),
            "ref": ref,
        }
        return loss, told | {"reward": reward}

    def _labels(self, data: TrainingSet[Feedback], rows: Sequence[int]) -> Tensor:
        return torch.tensor([data.examples[i].label for i in rows])


def _add(tally: Tally, prefix: str, label: Tensor, told: dict[str, Tensor]) -> None:
    """What explains a loss on single answers: both labels' likelihoods apart, and how far they moved."""
    tally.add(f"{prefix}accuracy", told["accuracy"].sum(), len(label))
    for kind, name in ((label, "liked"), (~label, "disliked")):
        if kind.any():
            count, places = int(kind.sum()), masked_indices(kind, told["logp"].device)
            tally.add(f"{prefix}logp/{name}", told["logp"][places].sum(), count)
            tally.add(f"{prefix}drift/{name}", (told["logp"] - told["ref"])[places].sum(), count)
            tally.add(f"{prefix}reward/{name}", told["reward"][places].sum(), count)


def mismatched(data: TrainingSet[Feedback], rows: Sequence[int], context: int | None) -> list[Encoded]:
    """Each row's prompt with the answer of the next row of the batch that answers another prompt.

    A row whose prompt is the only one in the batch gives none; an answer that does not fit the context is cut.
    """
    found, batch = [], [data.groups[i][0] for i in rows]
    for k, own in enumerate(batch):
        other = next((e for e in (*batch[k + 1 :], *batch[:k]) if e.prompt != own.prompt), None)
        if other is not None:
            room = None if context is None else context - len(own.prompt)
            found.append(Encoded(own.prompt, other.response[:room], other.mask[:room]))
    return [e for e in found if any(e.mask)]
