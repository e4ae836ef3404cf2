"""Preference losses over pairs of answers, as an objective.

The reference's log-probabilities of answers that are in memory are computed once, before the first step, and kept
there (a resumed run computes them again: one forward over the data). Of a set that is read while training they are
computed batch by batch, as the token-level methods do everywhere, which need whole distributions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steersman.data import EncodedSet, Preference, TrainingSet, collate_pairs
from steersman.distributed.micro import my_micro_batches
from steersman.loss.preference import Explain, PairLogp, pair_logp, reference_answer, soft_labelled
from steersman.model import Policy
from steersman.model.layout import response_slots, spread
from steersman.objectives.batch import right, rounding, weight_of
from steersman.objectives.preference_config import PairLossConfig
from steersman.run.progress import with_progress
from steersman.setup.reference import Readings, Reference, answer_logp_now, collision, divergence, shared_lengths
from steersman.train.held_prompts import HeldPrompts
from steersman.train.tally import Tally
from steersman.types import Stats, Tokens, send


class PairObjective:
    """The objective: the mean of a pair loss, both answers in one forward.

    `watch` answers held prompts at every look at held-out data. With an `anchor`, a second frozen policy and its
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
        watch: HeldPrompts | None = None,
        anchor: tuple[Reference, float] | None = None,
    ) -> None:
        self.module, self.reference, self.train, self.held_out = policy, reference, train, held_out
        self.config, self.micro_tokens, self.watch = config, micro_tokens, watch
        self.tails = config.ld_alpha != 1
        references: list[tuple[Reference, float]] = []
        if config.needs_reference and not config.needs_full_kl:
            assert reference is not None
            share = 0.0 if anchor is None else anchor[1]
            references = [(reference, 1 - share), *([] if anchor is None else [anchor])]
        self.readings = Readings(references, micro_tokens, tails=self.tails)
        self.reference_logp: dict[int, Tensor] = {}

    @property
    def cost(self) -> np.ndarray:
        """Tokens of each pair; of a stream, of those in its buffer."""
        return 2 * self.train.lengths

    def read_reference(self, rows: Sequence[int]) -> None:
        """Reads what the reference says of the training pairs `rows` and of the held-out ones, before the first
        `loss` or `evaluate`; of pairs that are streamed it is read batch by batch."""
        if self.readings.models:
            self.reference_logp = self.readings.of_data(self.train, self.held_out, rows)

    def denominator(self, rows: Sequence[int]) -> float:
        return weight_of(self.train.examples, rows)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        pair, loss, explain = self._run(self.train, rows)
        weights = torch.tensor([self.train.examples[i].weight for i in rows], dtype=loss.dtype)
        weight = send(weights, loss.device)
        tally.add("loss", (weight * loss).sum(), float(weights.sum()))
        for name, value in _told(pair, explain).items():
            tally.add(name, value.sum(), len(rows))
        return (weight * loss).sum() / denominator

    @torch.no_grad()
    def evaluate(self) -> Stats:
        """The same numbers on held-out pairs, and what the policy says to held prompts."""
        told = {} if self.watch is None else self.watch.look()
        if self.held_out is None:
            return told
        tally, cost = Tally(), torch.tensor(2 * self.held_out.lengths)
        for part in with_progress(my_micro_batches(cost, self.micro_tokens), "look at held-out pairs"):
            pair, loss, explain = self._run(self.held_out, part.rows.tolist())
            for name, value in {"loss": loss, **_told(pair, explain)}.items() if part.counts else ():
                tally.add(f"held_out/{name}", value.sum(), len(part.rows))
        return told | tally.means()

    def _run(self, data: TrainingSet[Preference], rows: Sequence[int]) -> tuple[PairLogp, Tensor, Explain]:
        tokens = collate_pairs([data.groups[i] for i in rows])
        mask, n = send(tokens.mask, self.module.device), len(rows)
        sums = self._reference(data, rows, tokens)
        hidden = self.module.hidden(tokens)
        logp = self.module.logp_from(tokens, hidden).logp
        ref = kl = None
        if self.config.needs_full_kl:
            ref, kl = self._divergence(tokens, hidden)
        own = self._own(tokens, hidden, logp) if self.config.needs_log_weight else None
        pair = pair_logp(
            logp[:n], mask[:n], logp[n:], mask[n:],
            chosen_log_weight=None if own is None else own[:n], rejected_log_weight=None if own is None else own[n:],
            ref_chosen=None if ref is None else ref[:n], ref_rejected=None if ref is None else ref[n:],
            chosen_kl=None if kl is None else kl[:n], rejected_kl=None if kl is None else kl[n:], tails=self.tails,
        )  # fmt: skip
        if sums is not None:
            whole, *tail = send(sums, logp.device).view(n, 2, -1).unbind(-1)
            pair = pair._replace(ref_chosen=whole[:, 0], ref_rejected=whole[:, 1])
            if tail:
                pair = pair._replace(ref_chosen_tail=tail[0][:, 0], ref_rejected_tail=tail[0][:, 1])
        examples = [data.examples[i] for i in rows]
        if self.config.margin_weight:
            lead = torch.tensor([e.margin or 0.0 for e in examples], dtype=logp.dtype)
            pair = pair._replace(offset=send(self.config.margin_weight * lead, logp.device))
        agreement = torch.tensor(
            [e.agreement if self.config.soft_labels else 1.0 for e in examples], dtype=logp.dtype
        )
        loss, explain = soft_labelled(self.config.of_pair, pair, agreement)
        if self.config.explore:
            told = torch.tensor([_of_reference(e) for e in examples], dtype=logp.dtype)
            chosen, rejected = send(told, logp.device).unbind(1)
            loss = loss + self.config.explore * reference_answer(pair, chosen, rejected)
        return pair, loss, explain

    def _reference(self, data: TrainingSet[Preference], rows: Sequence[int], tokens: Tokens) -> Tensor | None:
        """The reference's log-probabilities of both answers, `[B, 2]`, with tails `[B, 2, 2]`; None for a loss that
        takes none of whole answers."""
        if not self.readings.models:
            return None
        if data.in_memory:
            return self.reference_logp[id(data)][list(rows)]
        after = None
        if self.tails:  # all chosen answers stand in front of all rejected ones
            shared = shared_lengths([data.groups[i] for i in rows])
            after = shared[::2] + shared[1::2]
        found = answer_logp_now(self.readings.models, tokens, after=after)
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


def _of_reference(example: Preference) -> tuple[float, float]:
    """1 for the reference's answer, chosen or rejected, and 0 for the other; 0 for both where none is said to be."""
    chosen = example.chosen_from_reference
    return (0.0, 0.0) if chosen is None else (float(chosen), float(not chosen))


def _told(pair: PairLogp, explain: Explain) -> dict[str, Tensor]:
    """What explains a preference loss: both likelihoods apart, how far they moved, the implicit reward's margin."""
    told = {
        "accuracy": right(explain["margin"], tie=rounding(pair.chosen.detach())),
        "margin": explain["margin"],
        "logp/chosen": pair.chosen.detach(),
        "logp/rejected": pair.rejected.detach(),
    }
    if pair.ref_chosen is not None and pair.ref_rejected is not None:
        told["drift/chosen"] = pair.chosen.detach() - pair.ref_chosen
        told["drift/rejected"] = pair.rejected.detach() - pair.ref_rejected
    return told
