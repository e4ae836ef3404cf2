"""What distillation minimises: a divergence at each token, with a policy gradient where whole answers count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steersman.data import Encoded, collate
from steersman.distill.alignment import OtherTokenizer
from steersman.distill.recipe import DistillLoss
from steersman.distill.teacher import Answer, Teacher
from steersman.loss.distillation import distillation, still_to_come
from steersman.loss.reduce import denominator, reduce, token_weight
from steersman.model import Policy
from steersman.model.layout import response_slots, spread
from steersman.ops.divergence import Divergence, TeacherTopK, linear_divergence, sorted_distance
from steersman.ops.masked import masked_sum
from steersman.train.tally import Tally
from steersman.types import Tokens, send


class Distillation:
    """The objective: mean over tokens that count of D_t - w_t log q(y_t) - nll log q(y_t).

    w_t is the reward's advantage, times its weight, and for minillm what is still to come. `limit` is the fixed
    divisor of the "episode" average (tokens).
    """

    def __init__(
        self,
        policy: Policy,
        teacher: Teacher | OtherTokenizer,
        config: DistillLoss,
        *,
        limit: float,
        rewarded: bool = False,
    ) -> None:
        self.policy, self.teacher, self.config = policy, teacher, config
        self.limit, self.rewarded = limit, rewarded

    def denominator(self, answers: Sequence[Answer]) -> int:
        """Counted once over all answers of an update."""
        return denominator(_tokens(answers).mask, self.config.average)

    def loss(self, answers: Sequence[Answer], denominator: int, tally: Tally) -> Tensor:
        """The part of the loss that some of an update's answers make."""
        tokens = _tokens(answers)
        hidden = self.policy.hidden(tokens)
        mask = send(tokens.mask, hidden.device)
        # Before the divergence, so that its backward pass comes first: after this one sharded weights are given back.
        pulled = self.rewarded or self.config.name == "minillm" or self.config.nll > 0
        told = self.policy.logp_from(tokens, hidden, temperature=self.config.temperature) if pulled else None
        if isinstance(self.teacher, OtherTokenizer):
            divergence, weight = self._aligned(self.teacher, answers, tokens, hidden), None
            if self.rewarded:
                weight = self._advantage(answers, mask)
        else:
            divergence, weight = self._by_token(self.teacher, answers, tokens, mask, hidden, tally)
        logp = torch.zeros_like(divergence) if told is None else told.logp.to(divergence)
        per_token = distillation(divergence, logp, mask, weight=weight, nll=self.config.nll)
        steps = token_weight(mask, self.config.average, self.limit, per_token.dtype)
        loss = reduce(per_token, steps, denominator)
        tally.add("divergence", masked_sum(divergence.detach(), mask), int(tokens.mask.sum()))
        return loss

    @torch.no_grad()
    def apart(self, answers: Sequence[Answer], kind: Divergence) -> Tensor:
        """A divergence summed over each answer's tokens that count (nats), of a teacher with the same tokens."""
        assert not isinstance(self.teacher, OtherTokenizer)
        tokens = _tokens(answers)
        hidden = self.policy.hidden(tokens)
        reading = self.teacher.read(answers, logp=False, temperature=1.0)
        found = linear_divergence(hidden, self.policy.head(), reading.teacher, kind)
        return masked_sum(_laid(found, tokens).cpu(), tokens.mask, -1)

    def _by_token(
        self,
        teacher: Teacher,
        answers: Sequence[Answer],
        tokens: Tokens,
        mask: Tensor,
        hidden: Tensor,
        tally: Tally,
    ) -> tuple[Tensor, Tensor | None]:
        config, whole = self.config, self.config.name == "minillm"
        kind: Divergence = "reverse_kl" if config.name in ("minillm", "uld") else config.name
        reading = teacher.read(answers, logp=whole, temperature=config.temperature)
        found = linear_divergence(
            hidden, self.policy.head(), reading.teacher, kind, mix=config.mix, temperature=config.temperature
        )
        if isinstance(reading.teacher, TeacherTopK):
            tally.add("teacher/unlisted", reading.teacher.rest.sum(), len(found))
        weight = self._advantage(answers, mask) if self.rewarded else None
        if whole:
            assert reading.logp is not None
            with torch.no_grad():
                own = self.policy.logp_from(tokens, hidden, temperature=config.temperature).logp
            gap = _laid(reading.logp.to(own), tokens) - own
            to_come = still_to_come(gap, mask, normalised=config.normalised)
            weight = to_come if weight is None else weight + to_come
        return _laid(found, tokens), weight

    def _aligned(self, teacher: OtherTokenizer, answers: Sequence[Answer], tokens: Tokens, hidden: Tensor) -> Tensor:
        taught, places = teacher.read(answers)
        places = send(places, hidden.device)
        found = sorted_distance(hidden[places], self.policy.head(), taught, temperature=self.config.temperature)
        return _laid(found.new_zeros(len(hidden)).index_add(0, places, found), tokens)

    def _advantage(self, answers: Sequence[Answer], mask: Tensor) -> Tensor:
        each = send(torch.tensor([a.advantage for a in answers]), mask.device)
        return (self.config.reward_weight * each)[:, None].expand(mask.shape)


def _tokens(answers: Sequence[Answer]) -> Tokens:
    return collate([Encoded(a.prompt, a.response, a.mask) for a in answers])


def _laid(packed: Tensor, tokens: Tokens) -> Tensor:
    """Numbers of all response tokens, packed row by row, as `[B, T]`; 0 beyond each response."""
    return spread(packed, response_slots(tokens))
