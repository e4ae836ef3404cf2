"""What distillation minimises: a divergence at each token, with a policy gradient where whole answers count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steersman.data import Encoded, collate
from steersman.distill.recipe import DistillLoss
from steersman.distill.teacher import Answer, Measure, Teacher
from steersman.loss.distillation import distillation, still_to_come
from steersman.loss.reduce import denominator, reduce, token_weight
from steersman.model import Policy
from steersman.model.layout import response_slots, spread
from steersman.ops.divergence import Divergence
from steersman.ops.masked import masked_sum
from steersman.train.tally import Tally
from steersman.types import Tokens, send


class Distillation:
    """The objective: mean over tokens that count of D_t - w_t log q(y_t) - nll log q(y_t).

    w_t is the reward's advantage, times `reward_weight`, and for minillm what is still to come. Of an answer that is
    not `taught` D_t is 0, and its tokens count in the mean as others do. `limit` is the fixed divisor of the
    "episode" average (tokens).
    """

    def __init__(
        self,
        policy: Policy,
        teacher: Teacher,
        config: DistillLoss,
        *,
        limit: float,
        reward_weight: float = 0.0,
    ) -> None:
        self.policy, self.teacher, self.config = policy, teacher, config
        self.limit, self.reward_weight = limit, reward_weight

    def learned_from(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """Those that have a part in the gradient, and one at least: of an update all, where every answer is pulled by
        its reward or its likelihood."""
        if self.reward_weight > 0 or self.config.nll > 0:
            return answers
        return [a for a in answers if a.taught] or answers[:1]

    def denominator(self, answers: Sequence[Answer]) -> int:
        """Counted once over all answers of an update."""
        return denominator(_tokens(answers).mask, self.config.average)

    def loss(self, answers: Sequence[Answer], denominator: int, tally: Tally) -> Tensor:
        """The part of the loss that some of an update's answers make."""
        tokens = _tokens(answers)
        hidden = self.policy.hidden(tokens)
        mask = send(tokens.mask, hidden.device)
        taught = tokens.mask & torch.tensor([a.taught for a in answers])[:, None]
        # Before the divergence, so that its backward pass comes first: after this one sharded weights are given back.
        pulled = self.reward_weight > 0 or self.config.name == "minillm" or self.config.nll > 0
        told = self.policy.logp_from(tokens, hidden, temperature=self.config.temperature) if pulled else None
        divergence, weight = self._compared(answers, tokens, send(taught, hidden.device), hidden, tally)
        logp = torch.zeros_like(divergence) if told is None else told.logp.to(divergence)
        per_token = distillation(divergence, logp, mask, weight=weight, nll=self.config.nll)
        steps = token_weight(mask, self.config.average, self.limit, per_token.dtype)
        loss = reduce(per_token, steps, denominator)
        tally.add("divergence", masked_sum(divergence.detach(), mask), int(taught.sum()))
        return loss

    @torch.no_grad()
    def answer_divergence(self, answers: Sequence[Answer], kind: Divergence) -> Tensor:
        """A divergence summed over each answer's tokens that count (nats), of a teacher with the same tokens."""
        tokens = _tokens(answers)
        hidden = self.policy.hidden(tokens)
        compared = self.teacher.compare(answers, hidden, self.policy.head(), Measure(kind))
        return masked_sum(_laid(compared.divergence, tokens).cpu(), tokens.mask, -1)

    def _compared(
        self, answers: Sequence[Answer], tokens: Tokens, taught: Tensor, hidden: Tensor, tally: Tally
    ) -> tuple[Tensor, Tensor | None]:
        """The divergence at every token that is `taught` `[B, T]`, 0 at others, and w_t where there is one."""
        config, whole = self.config, self.config.name == "minillm"
        kind: Divergence = "reverse_kl" if config.name in ("minillm", "uld") else config.name
        measure = Measure(kind, config.mix, config.temperature, config.top_k, config.tail, logp=whole)
        compared = self.teacher.compare(answers, hidden, self.policy.head(), measure)
        if compared.unlisted_mass is not None:
            tally.add("teacher/unlisted", compared.unlisted_mass.sum(), len(compared.unlisted_mass))
        weight = self._advantage(answers, taught) if self.reward_weight > 0 else None
        if whole:
            assert compared.logp is not None
            with torch.no_grad():
                own = self.policy.logp_from(tokens, hidden, temperature=config.temperature).logp
            gap = _laid(compared.logp.to(own), tokens) - own
            to_come = still_to_come(gap, taught, normalised=config.normalised)
            weight = to_come if weight is None else weight + to_come
        return torch.where(taught, _laid(compared.divergence, tokens), 0.0), weight

    def _advantage(self, answers: Sequence[Answer], like: Tensor) -> Tensor:
        each = send(torch.tensor([a.advantage for a in answers]), like.device)
        return (self.reward_weight * each)[:, None].expand(like.shape)


def _tokens(answers: Sequence[Answer]) -> Tokens:
    return collate([Encoded(a.prompt, a.response, a.mask) for a in answers])


def _laid(packed: Tensor, tokens: Tokens) -> Tensor:
    """Numbers of all response tokens, packed row by row, as `[B, T]`; 0 beyond each response."""
    return spread(packed, response_slots(tokens))
