"""Losses of the tokens of completions, as an objective."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steersman.data import Demonstration, EncodedSet, TrainingSet, collate
from steersman.distributed.micro import my_micro_batches
from steersman.loss.reduce import reduce, token_weight
from steersman.loss.supervised import TOKEN_LOSSES, nll
from steersman.model import Policy
from steersman.ops.masked import last_step, masked_sum
from steersman.ops.text import perplexity
from steersman.run.progress import with_progress
from steersman.train.tally import Tally
from steersman.types import Stats, send


class SFT:
    """The objective: the mean of a loss over the tokens that count.

    `loss` names it in `TOKEN_LOSSES`. Whatever it is, what is told is the negative log-likelihood per token, in nats;
    for another loss also the mean probability of a token.
    """

    def __init__(
        self,
        policy: Policy,
        train: TrainingSet[Demonstration],
        held_out: EncodedSet[Demonstration] | None,
        micro_tokens: int,
        *,
        loss: str = "nll",
    ) -> None:
        self.module, self.train, self.held_out, self.micro_tokens = policy, train, held_out, micro_tokens
        self.token_loss, self.tells_probability = TOKEN_LOSSES[loss], loss != "nll"

    @property
    def cost(self) -> np.ndarray:
        """Tokens of each row; of a stream, of those in its buffer."""
        return self.train.lengths

    def denominator(self, rows: Sequence[int]) -> float:
        return max(sum(sum(self.train.groups[i][0].mask) for i in rows), 1)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        tokens = collate([self.train.groups[i][0] for i in rows])
        logp = self.module.logp(tokens).logp
        mask = send(tokens.mask, logp.device)
        self._tell(tally, "", logp.detach(), mask, int(tokens.mask.sum()))
        return reduce(self.token_loss(logp), token_weight(mask, "token", dtype=logp.dtype), denominator)

    def _tell(self, tally: Tally, prefix: str, logp: Tensor, mask: Tensor, count: int) -> None:
        tally.add(f"{prefix}loss", masked_sum(nll(logp), mask), count)
        if self.tells_probability:
            tally.add(f"{prefix}probability", masked_sum(logp.exp(), mask), count)

    @torch.no_grad()
    def evaluate(self) -> Stats:
        """Held-out loss in nats per token, its exponential, and the loss of each row's last token that counts."""
        if self.held_out is None:
            return {}
        tally, held, lengths = Tally(), self.held_out.groups, torch.tensor(self.held_out.lengths)
        for part in with_progress(my_micro_batches(lengths, self.micro_tokens), "look at held-out rows"):
            tokens = collate([held[i][0] for i in part.rows.tolist()])
            logp = self.module.logp(tokens).logp.cpu()
            mask = tokens.mask
            if part.counts:
                self._tell(tally, "held_out/", logp, mask, int(mask.sum()))
                some, last = mask.any(-1), last_step(mask).clamp(min=0)
                ends = nll(logp).gather(1, last[:, None])[:, 0]
                tally.add("held_out/loss_last_token", masked_sum(ends, some), int(some.sum()))
        stats = tally.means()
        return stats | {"held_out/perplexity": perplexity(stats["held_out/loss"])}
