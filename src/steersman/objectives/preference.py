"""Preference losses over pairs of answers, as an objective.

The reference's log-probabilities of answers that are in memory are computed once, before the first step, and kept
there (a resumed run computes them again: one forward over the data). Of a set that is read while training, and of a
reference that moves, they are computed batch by batch, as the token-level methods do everywhere, which need whole
distributions.

A loss of a whole batch reads the batch once without gradients before its update, so that every micro-batch knows what
it is compared with: the gradient is that of the batch in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steersman.data import EncodedSet, Preference, TrainingSet, collate_pairs
from steersman.distributed.micro import my_micro_batches
from steersman.loss.pairs import BatchLogp
from steersman.loss.preference import (
    AnswerLogp,
    Explain,
    PairLogp,
    as_batch,
    gold_nll,
    pair_logp,
    reference_answer,
    soft_labelled,
)
from steersman.model import Policy
from steersman.model.layout import masked_indices, response_slots, spread
from steersman.objectives.batch import majority, right, rounding, weight_of
from steersman.objectives.preference_config import PairLossConfig
from steersman.ops.masked import masked_sum
from steersman.run.progress import with_progress
from steersman.setup.reference import (
    Readings,
    Reference,
    answer_logp,
    answer_logp_now,
    collision,
    divergence,
    shared_lengths,
)
from steersman.train.reference_looks import ReferenceLooks
from steersman.train.tally import Tally
from steersman.types import Stats, Tokens, send


class PairObjective:
    """The objective: the mean of a pair loss, both answers (and the gold one, where it is asked for) in one forward.

    `looks` answers held prompts at every look at held-out data. With an `anchor`, a second frozen policy and its
    share, the reference is the geometric mixture of both: log pi_ref = (1 - share) log reference + share log anchor,
    up to a number per prompt, which no pair feels.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        train: TrainingSet[Preference],
        held_out: EncodedSet[Preference] | None,
        config: PairLossConfig,
        micro_tokens: int,
        looks: ReferenceLooks | None = None,
        anchor: tuple[Reference, float] | None = None,
    ) -> None:
        self.module, self.reference, self.train, self.held_out = policy, reference, train, held_out
        self.config, self.micro_tokens, self.looks = config, micro_tokens, looks
        self.tails, self.answers = config.ld_alpha != 1, 3 if config.gold_nll else 2
        references: list[tuple[Reference, float]] = []
        if config.needs_reference and not config.needs_full_kl:
            assert reference is not None
            share = 0.0 if anchor is None else anchor[1]
            references = [(reference, 1 - share), *([] if anchor is None else [anchor])]
        self.readings = Readings(references, micro_tokens, tails=self.tails, first=2)
        self.reference_logp: dict[int, Tensor] = {}
        self.batch: BatchLogp | None = None
        self.places: dict[int, int] = {}

    @property
    def cost(self) -> np.ndarray:
        """Tokens of each pair with its gold answer; of a stream, of those in its buffer."""
        return self.answers * self.train.lengths

    def read_reference(self, rows: Sequence[int]) -> None:
        """Reads what the reference says of the training pairs `rows` and of the held-out ones, before the first
        `loss` or `evaluate`. Where that was not asked for, and of pairs that are streamed, it is read batch by
        batch."""
        if self.readings.models:
            self.reference_logp = self.readings.of_data(self.train, self.held_out, rows)

    def look(self, rows: Sequence[int]) -> None:
        """What a loss of a whole batch must know of it before its update."""
        self._look(self.train, rows, [self.train.examples[i].weight for i in rows])

    def _look(self, data: TrainingSet[Preference], rows: Sequence[int], weights: Sequence[float]) -> None:
        """Reads the batch of a loss of whole batches, without gradients. A row that stands in it several times, as a
        mixture of sets may draw it, is one that counts as often."""
        if not self.config.of_batch:
            return
        counts: dict[int, float] = {}
        for row, weight in zip(rows, weights, strict=True):
            counts[row] = counts.get(row, 0.0) + weight
        once = list(counts)
        groups = [data.groups[i][:2] for i in once]
        answers = [e for group in groups for e in group]
        after = shared_lengths(groups) if self.tails else None

        def read(model: Reference) -> Tensor:
            """`[N, 2]`, with tails `[N, 2, 2]`."""
            logp = answer_logp(model, answers, self.micro_tokens, after=after)
            return logp.view(len(once), 2, *logp.shape[1:])

        if id(data) in self.reference_logp:
            reference = self.reference_logp[id(data)][once]
        else:
            reference = torch.stack([share * read(model) for model, share in self._references()]).sum(0)
        own = read(self.module)
        chosen, rejected = own.view(len(once), 2, -1)[..., 0].unbind(1)
        length = torch.tensor([[sum(e.mask) for e in group] for group in groups], dtype=own.dtype)
        pair = _with_reference(PairLogp(chosen, rejected, length[:, 0], length[:, 1]), reference)
        if self.tails:
            pair = pair._replace(chosen_tail=own[:, 0, 1], rejected_tail=own[:, 1, 1])
        weight = torch.tensor([counts[i] for i in once], dtype=torch.float64)
        self.batch = as_batch(self.config.compared(pair), weight, self._order_share(data, once))
        self.places = {row: place for place, row in enumerate(once)}

    def _references(self) -> Sequence[tuple[Reference, float]]:
        """The references with their shares, also where a loss beside takes whole distributions of the only one."""
        if self.readings.models:
            return self.readings.models
        assert self.reference is not None
        return [(self.reference, 1.0)]

    def _order_share(self, data: TrainingSet[Preference], rows: Sequence[int]) -> Tensor:
        """How much each pair counts in its given order, `[B]`; the rest counts the other way round."""
        agreement = _agreement(data, rows)
        return agreement if self.config.soft_labels else (1 + majority(agreement)) / 2

    def denominator(self, rows: Sequence[int]) -> float:
        return weight_of(self.train.examples, rows)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        loss, told = self._run(self.train, rows)
        weights = torch.tensor([self.train.examples[i].weight for i in rows], dtype=loss.dtype)
        weight = send(weights, loss.device)
        tally.add("loss", (weight * loss).sum(), float(weights.sum()))
        _add(tally, "", told)
        return (weight * loss).sum() / denominator

    @torch.no_grad()
    def evaluate(self) -> Stats:
        """The same numbers on held-out pairs, and what the policy says to held prompts."""
        told = {} if self.looks is None else self.looks.look()
        if self.held_out is None:
            return told
        self._look(self.held_out, range(len(self.held_out.groups)), [1.0] * len(self.held_out.groups))
        tally, cost = Tally(), torch.tensor(self.answers * self.held_out.lengths)
        for part in with_progress(my_micro_batches(cost, self.micro_tokens), "look at held-out pairs"):
            loss, explained = self._run(self.held_out, part.rows.tolist())
            if part.counts:
                _add(tally, "held_out/", {"loss": loss, **explained})
        return told | tally.means()

    def _run(self, data: TrainingSet[Preference], rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of some pairs, `[B]`, and what explains them (`_told`)."""
        tokens = collate_pairs([data.groups[i] for i in rows])
        mask, n = send(tokens.mask, self.module.device), len(rows)
        w, l, gold = slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n)  # noqa: E741
        sums = self._reference(data, rows, tokens)
        hidden = self.module.hidden(tokens)
        logp = self.module.logp_from(tokens, hidden).logp
        ref = kl = None
        if self.config.needs_full_kl:
            ref, kl = self._divergence(tokens, hidden)
        own = self._own(tokens, hidden, logp) if self.config.needs_log_weight else None
        chosen, rejected = (
            AnswerLogp(logp[at], mask[at], *(None if x is None else x[at] for x in (ref, kl, own))) for at in (w, l)
        )
        pair = pair_logp(chosen, rejected, tails=self.tails)
        if sums is not None:
            pair = _with_reference(pair, send(sums, logp.device))
        if self.batch is not None:
            pair = pair._replace(batch=self.batch._replace(places=torch.tensor([self.places[i] for i in rows])))
        examples = [data.examples[i] for i in rows]
        if self.config.margin_weight:
            lead = torch.tensor([e.margin or 0.0 for e in examples], dtype=logp.dtype)
            pair = pair._replace(offset=send(self.config.margin_weight * lead, logp.device))
        share = self._order_share(data, rows).to(logp.dtype)
        loss, explain = soft_labelled(self.config.of_pair, pair, share)
        if self.config.explore:
            told = torch.tensor([_of_reference(e) for e in examples], dtype=logp.dtype)
            loss = loss + self.config.explore * reference_answer(pair, *send(told, logp.device).unbind(1))
        explained = _told(pair, explain, majority(_agreement(data, rows)))
        if self.config.gold_nll:
            loss = loss + self.config.gold_nll * gold_nll(logp[gold], mask[gold])
            explained["logp/gold"] = masked_sum(logp[gold].detach(), mask[gold], -1)
        return loss, explained

    def _reference(self, data: TrainingSet[Preference], rows: Sequence[int], tokens: Tokens) -> Tensor | None:
        """The reference's log-probabilities of both answers, `[B, 2]`, with tails `[B, 2, 2]`; None for a loss that
        takes none of whole answers."""
        if not self.readings.models:
            return None
        if id(data) in self.reference_logp:
            return self.reference_logp[id(data)][list(rows)]
        after = None
        if self.tails:  # all chosen answers stand in front of all rejected ones
            shared = shared_lengths([data.groups[i][:2] for i in rows])
            after = shared[::2] + shared[1::2]
        pairs = tokens.rows(torch.arange(2 * len(rows)))
        found = answer_logp_now(self.readings.models, pairs, after=after)
        return torch.stack(found.chunk(2), 1)

    @torch.no_grad()
    def _own(self, tokens: Tokens, hidden: Tensor, logp: Tensor) -> Tensor:
        """log pi(y_t) - log sum_v pi(v | s_t)^2 at every response token, `[2B, T]`."""
        return logp - spread(collision(hidden, self.module.head()).to(logp), response_slots(tokens))

    def _divergence(self, tokens: Tokens, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities and KL(pi_ref || pi) at every response token, `[2B, T]`."""
        assert self.reference is not None
        with torch.no_grad():
            hidden_ref = self.reference.hidden(tokens)
            ref = self.reference.logp_from(tokens, hidden_ref).logp
        per_token = divergence(hidden_ref, self.reference.head(), hidden, self.module.head())
        return ref, spread(per_token.to(ref), response_slots(tokens))


def _with_reference(pair: PairLogp, sums: Tensor) -> PairLogp:
    """The pair with the reference's log-probabilities of both answers, `[B, 2]`, or with their tails `[B, 2, 2]`."""
    whole, *tail = sums.view(len(sums), 2, -1).unbind(-1)
    pair = pair._replace(ref_chosen=whole[:, 0], ref_rejected=whole[:, 1])
    return pair._replace(ref_chosen_tail=tail[0][:, 0], ref_rejected_tail=tail[0][:, 1]) if tail else pair


def _of_reference(example: Preference) -> tuple[float, float]:
    """1 for the reference's answer, chosen or rejected, and 0 for the other; 0 for both where none is said to be."""
    chosen = example.chosen_from_reference
    return (0.0, 0.0) if chosen is None else (float(chosen), float(not chosen))


def _agreement(data: TrainingSet[Preference], rows: Sequence[int]) -> Tensor:
    """The share of raters who preferred the first answer, `[B]`."""
    return torch.tensor([data.examples[i].agreement for i in rows], dtype=torch.float64)


def _told(pair: PairLogp, explain: Explain, side: Tensor) -> dict[str, Tensor]:
    """What explains a preference loss: both likelihoods apart, how far they moved, the implicit reward's margin.

    Of pairs of which most raters preferred the second answer (`side` -1, see `majority`), that one is the chosen one.
    Margin and accuracy are of the pairs on which raters are not evenly split.
    """
    chosen, rejected = pair.chosen.detach(), pair.rejected.detach()
    decided = masked_indices(side != 0, chosen.device)
    side = send(side.to(chosen.dtype), chosen.device)

    def ordered(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(side < 0, second, first), torch.where(side < 0, first, second)

    margin = side * explain["margin"]
    told = {"accuracy": right(margin, tie=rounding(chosen))[decided], "margin": margin[decided]}
    told["logp/chosen"], told["logp/rejected"] = ordered(chosen, rejected)
    if pair.ref_chosen is not None and pair.ref_rejected is not None:
        drift = ordered(chosen - pair.ref_chosen, rejected - pair.ref_rejected)
        told["drift/chosen"], told["drift/rejected"] = drift
    return told


def _add(tally: Tally, prefix: str, told: dict[str, Tensor]) -> None:
    """The means of what is told of some pairs; nothing of what none of them has."""
    for name, value in told.items():
        if len(value):
            tally.add(f"{prefix}{name}", value.sum(), len(value))
