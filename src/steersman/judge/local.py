"""A judge that is a causal model on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from steersman.data import Layout, template_ends
from steersman.judge.cache import Reply
from steersman.judge.config import LocalConfig
from steersman.judge.endpoint import Lose, RefusedQuestionError, end_the_run
from steersman.model import context_length, load_policy
from steersman.rollout import Engine, Sampling
from steersman.rollout.engine import end_ids
from steersman.run.device import resolve_device
from steersman.types import Prompt, Tokens


class Local:
    """Reads a question and weighs the verdicts, or writes a reply.

    With `read: logp` the reply is the log-probability (nats) of each verdict word right after the question, a
    deterministic number that needs no parsing. Where the tokenizer spells one verdict as the beginning of another
    (10 as "1", "0"), the shorter one's is that of being the whole verdict. With `read: text` the model writes
    greedily and its text is read as an endpoint's. A tokenizer with a chat template sees the question as a user's
    turn.
    """

    def __init__(self, config: LocalConfig) -> None:
        self.config = config
        self.policy = load_policy(config.path, device=resolve_device(config.device), trainable=False)
        tokenizer = self.policy.tokenizer
        self.chats = bool(tokenizer.chat_template)
        self.layout = Layout(tokenizer, wrap_in_chat=self.chats)
        self.context = context_length(self.policy.model)
        ends = end_ids(self.policy.model, tokenizer, also=template_ends(tokenizer))
        self.engine = Engine(self.policy.model, tokenizer, eos_token_id=ends)

    def weigh(
        self,
        texts: Sequence[str],
        verdicts: Sequence[str],
        keep: Callable[[int, Reply], None],
        may_ask: Callable[[], bool],
        *,
        lose: Lose = end_the_run,
    ) -> None:
        """Gives `keep` the log-probability of every verdict after each text: {"logp": {verdict: nats}}.

        A text that is too long goes to `lose`, which returns the error that is to end the work, or None.
        """
        said = [self.layout.codec.more(v if self.chats else f" {v}") for v in verdicts]
        begun = nearest_longer(said)
        for start in range(0, len(texts), self.config.batch):
            if not may_ask():
                return
            rows = self._rows(texts, start, max(map(len, said)), lose)
            if not rows:
                continue
            ids = list(rows.values())
            tokens = Tokens.from_ids([i for i in ids for _ in said], [s for _ in ids for s in said])
            with torch.no_grad():
                logp = torch.where(tokens.mask, self.policy.logp(tokens).logp.cpu(), 0.0).sum(-1)
            for row, told in zip(rows, logp.view(len(ids), len(said)).tolist(), strict=True):
                reply: Reply = {"logp": dict(zip(verdicts, whole(told, begun), strict=True))}
                keep(row, reply | {"tokens": len(rows[row]) + 1})

    def write(
        self,
        texts: Sequence[str],
        keep: Callable[[int, Reply], None],
        may_ask: Callable[[], bool],
        lose: Lose = end_the_run,
    ) -> None:
        """Gives `keep` what the model writes after each text: {"text": ..., "cut": whether the limit ended it}.

        A text that is too long goes to `lose`, as in `weigh`.
        """
        sampling = Sampling(max_new_tokens=self.config.max_tokens, temperature=0.0)
        for start in range(0, len(texts), self.config.batch):
            if not may_ask():
                return
            rows = self._rows(texts, start, self.config.max_tokens, lose)
            prompts = [Prompt(ids, texts[row], index=i) for i, (row, ids) in enumerate(rows.items())]
            for row, sample in zip(rows, self.engine.generate(prompts, sampling) if prompts else [], strict=True):
                tokens = len(sample.prompt.ids) + len(sample.ids)
                keep(row, {"text": sample.text, "tokens": tokens, "cut": sample.finish == "length"})

    def _rows(self, texts: Sequence[str], start: int, room: int, lose: Lose) -> dict[int, list[int]]:
        """The ids of one batch's texts by their places, without those that leave no `room` for a reply."""
        found: dict[int, list[int]] = {}
        for row in range(start, min(start + self.config.batch, len(texts))):
            ids, _ = self.layout.prompt(texts[row])
            if self.context is None or len(ids) + room <= self.context:
                found[row] = ids
                continue
            failure = lose(
                row,
                RefusedQuestionError(
                    f"judge {self.config.path}: a question has {len(ids)} tokens, which with {room} for the reply is "
                    f"more than the model's context of {self.context}; shorten the answers or the judge's template, "
                    "or take a judge with a longer context"
                ),
            )
            if failure is not None:
                raise failure
        return found


def nearest_longer(said: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each list of token ids the places of those that it begins, without those that another of them begins."""
    every = range(len(said))
    longer = [
        [b for b in every if len(ids) < len(said[b]) and list(said[b][: len(ids)]) == list(ids)] for ids in said
    ]
    return [[b for b in found if not any(b in longer[c] for c in found)] for found in longer]


def whole(logp: Sequence[float], begun: Sequence[Sequence[int]]) -> list[float]:
    """The log-probabilities (nats) of verdicts as whole words, from those of their token ids as beginnings.

    From a verdict's probability goes that of the verdicts which it begins (`nearest_longer`), so that none is counted
    twice; at least 1e-9 of it stays.
    """
    taken = [sum(math.exp(logp[b] - x) for b in found) for x, found in zip(logp, begun, strict=True)]
    return [x + math.log(max(1 - share, 1e-9)) for x, share in zip(logp, taken, strict=True)]


def likeliest(logp: dict[str, float], margin: float) -> float:
    """A comparison's share from the verdicts' log-probabilities: the likeliest of A, B and C; a tie where A leads
    B (or B leads A) by `margin` nats or less."""
    if abs(logp["A"] - logp["B"]) <= margin or logp["C"] > max(logp["A"], logp["B"]):
        return 0.5
    return float(logp["A"] > logp["B"])


def expected(logp: dict[str, float]) -> float:
    """The grade expected under the grades' probabilities, sum_g g p(g) / sum_g p(g)."""
    top = max(logp.values())
    weight = {int(g): math.exp(x - top) for g, x in logp.items()}
    return sum(g * w for g, w in weight.items()) / sum(weight.values())
