"""The mean negative log-likelihood of completions, as an objective."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steersman.data import Demonstration, EncodedSet, TrainingSet, collate
from steersman.distributed.micro import my_micro_batches
from steersman.loss.reduce import reduce, token_weight
from steersman.loss.supervised import nll
from steersman.model import Policy
from steersman.ops.masked import masked_sum
from steersman.run.progress import with_progress
from steersman.train.tally import Tally
from steersman.types import Stats, send


class SFT:
    """The objective: mean negative log-likelihood per token that counts, in nats."""

    def __init__(
        self,
        policy: Policy,
        train: TrainingSet[Demonstration],
        held_out: EncodedSet[Demonstration] | None,
        micro_tokens: int,
    ) -> None:
        self.module, self.train, self.held_out, self.micro_tokens = policy, train, held_out, micro_tokens

    @property
    def cost(self) -> np.ndarray:
        """Tokens of each row; of a stream, of those in its buffer."""
        return self.train.lengths

    def denominator(self, rows: Sequence[int]) -> float:
        return max(sum(sum(self.train.groups[i][0].mask) for i in rows), 1)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        tokens = collate([self.train.groups[i][0] for i in rows])
        per_token = nll(self.module.logp(tokens).logp)
        mask = send(tokens.mask, per_token.device)
        loss = reduce(per_token, token_weight(mask, "token", dtype=per_token.dtype), denominator)
        tally.add("loss", loss * denominator, int(tokens.mask.sum()))
        return loss

    @torch.no_grad()
    def evaluate(self) -> Stats:
        """Held-out loss in nats per token, its exponential, and the loss of the end tokens alone."""
        if self.held_out is None:
            return {}
        tally, held, lengths = Tally(), self.held_out.groups, torch.tensor(self.held_out.lengths)
        for part in with_progress(my_micro_batches(lengths, self.micro_tokens), "look at held-out rows"):
            tokens = collate([held[i][0] for i in part.rows.tolist()])
            loss = nll(self.module.logp(tokens).logp).cpu()
            last = (tokens.response_length - 1).clamp(min=0)
            if part.counts:
                tally.add("held_out/loss", masked_sum(loss, tokens.mask), int(tokens.mask.sum()))
                tally.add("held_out/loss_last_token", loss.gather(1, last[:, None]).sum(), len(part.rows))
        stats = tally.means()
        return stats | {"held_out/perplexity": math.exp(min(stats["held_out/loss"], 50))}
