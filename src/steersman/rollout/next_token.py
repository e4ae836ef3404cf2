"""The next token of each running response: what may come, the draw, and whether it ends the response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steersman.ops.distributions import top_p_mask
from steersman.rollout.responses import ActionMask, Drawing, RunningResponse, TokenLogp
from steersman.rollout.sampling import Sampling, banned_support, draw, listed_support, restrict
from steersman.types import Finish, Sample, send


class Drawn(NamedTuple):
    """One token for each sequence, the samples of those that it finished, by their places, and the places of those
    whose logits are not finite."""

    tokens: Tensor
    finished: dict[int, Sample]
    broken: list[int]


class NextToken:
    """Draws the next tokens of a batch.

    `known` is how many ids the tokenizer has, `width` how many the model scores; those beyond are never drawn.
    Samples carry `version`, that of the weights. With `record` each response keeps the ids that it could have
    drawn, where any were cut away.
    """

    def __init__(
        self,
        sampling: Sampling,
        end_ids: Sequence[int],
        *,
        known: int | None,
        width: int,
        record: bool,
        action_mask: ActionMask | None,
        version: int,
        device: torch.device,
    ) -> None:
        self.sampling, self.action_mask = sampling, action_mask
        self.version, self.device = version, device
        self.ends = frozenset(end_ids)
        self.end_ids = send(torch.tensor(sorted(self.ends), dtype=torch.long), device)
        padding = [] if known is None else [v for v in range(known, width) if v not in self.ends]
        self.padding = send(torch.tensor(padding, dtype=torch.long), device)  # ids that the tokenizer lacks
        self.cut = sampling.truncates or action_mask is not None
        self.record = record and (self.cut or bool(padding) or sampling.min_new_tokens > 0)

    def draw(self, logits: list[Tensor], sequences: list[RunningResponse], uniform: Tensor | None) -> Drawn:
        """Draws one token for each sequence."""
        parts: dict[Drawing, list[int]] = {}
        for row, sequence in enumerate(sequences):
            parts.setdefault(sequence.drawing, []).append(row)
        if len(parts) == 1:
            return self._draw_alike(logits, sequences, uniform, sequences[0].drawing.sampling)
        drawn = torch.empty(len(sequences), dtype=torch.long, device=self.device)
        finished: dict[int, Sample] = {}
        broken: list[int] = []
        for how, rows in parts.items():
            at = send(torch.tensor(rows), self.device)
            some = self._draw_alike(
                [one[at] for one in logits], [sequences[row] for row in rows],
                None if uniform is None else uniform[at], how.sampling,
            )  # fmt: skip
            drawn[at] = some.tokens
            finished |= {rows[i]: sample for i, sample in some.finished.items()}
            broken += [rows[i] for i in some.broken]
        return Drawn(drawn, finished, broken)

    def _draw_alike(
        self, logits: list[Tensor], sequences: list[RunningResponse], uniform: Tensor | None, sampling: Sampling
    ) -> Drawn:
        """As `draw`, for sequences that are all drawn in the same way."""
        banned = None
        if sampling.min_new_tokens and self.ends:
            short = [len(s.ids) < sampling.min_new_tokens for s in sequences]
            banned = send(torch.tensor(short), self.device) if any(short) else None
        if len(self.padding):
            logits = [one.index_fill(-1, self.padding, -torch.inf) for one in logits]
        allowed = None if self.action_mask is None else self._actions(logits[1].float(), self.action_mask, banned)
        x = restrict(logits[0], sampling, banned, self.end_ids, allowed)
        drawn, logp = draw(x, None if sampling.greedy else uniform)
        if self.record:
            self._record(x, sequences)
        if sequences[0].drawing.likeliest is not None:
            _note_likeliest(logits[0], drawn, sequences, sequences[0].drawing.likeliest)
        finished: dict[int, Sample] = {}
        broken: list[int] = []
        for i, (sequence, token, lp) in enumerate(zip(sequences, *_read(drawn, logp), strict=True)):
            if lp != lp:
                broken.append(i)
                continue
            sequence.ids.append(token)
            sequence.logp.append(lp)
            may_end = token in self.ends or sampling.stop or len(sequence.ids) == sampling.max_new_tokens
            sample = self._ended(sequence, token) if may_end else None
            if sample is not None:
                finished[i] = sample
        return Drawn(drawn, finished, broken)

    def _actions(self, logits: Tensor, mask: ActionMask, banned: Tensor | None) -> Tensor:
        """The nucleus of the masking policy among the tokens that may come at all, and every end token: [B, V]."""
        if banned is not None:
            ends = logits[:, self.end_ids].masked_fill(banned[:, None], -torch.inf)
            logits = logits.index_copy(-1, self.end_ids, ends)
        return top_p_mask(logits, mask.top_p, mask.min_tokens).index_fill(-1, self.end_ids, True)

    def _record(self, x: Tensor, sequences: list[RunningResponse]) -> None:
        """Note which tokens each sequence could have drawn."""
        if self.cut:
            ids = listed_support(x != -torch.inf)
        else:  # only padding and end tokens were banned: all rows share two lists
            always, short = banned_support(self.padding, self.end_ids)
            ids = [short if len(s.ids) < self.sampling.min_new_tokens else always for s in sequences]
        for sequence, some in zip(sequences, ids, strict=True):
            sequence.support.append(some)  # type: ignore[union-attr]

    def _ended(self, sequence: RunningResponse, token: int) -> Sample | None:
        """The finished sample where the token just appended ends the response."""
        finish: Finish | None = None
        text = None
        if token in self.ends:
            finish = "eos"
        elif len(sequence.ids) >= sequence.drawing.sampling.min_new_tokens:
            text = sequence.drawing.texts.stopped(sequence.prompt.ids, sequence.ids)
            finish = None if text is None else "stop"
        if finish is None and len(sequence.ids) == sequence.drawing.sampling.max_new_tokens:
            finish = "length"
        if finish is None:
            return None
        if text is None:
            ids = sequence.ids[: len(sequence.ids) - (finish == "eos")]
            text = sequence.drawing.texts.response(sequence.prompt.ids, ids)
        return sequence.sample(finish, text, self.version)


def _read(drawn: Tensor, logp: Tensor) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities as numbers; an accelerator is waited for once."""
    if drawn.is_cpu:
        return drawn.tolist(), logp.tolist()
    ids, logps = torch.stack([drawn.double(), logp.double()]).tolist()
    return [int(token) for token in ids], logps


def _note_likeliest(logits: Tensor, drawn: Tensor, sequences: list[RunningResponse], count: int) -> None:
    logp = logits.float().log_softmax(-1)
    own = logp.gather(-1, drawn[:, None]).squeeze(-1).tolist()
    top = logp.topk(min(count, logp.shape[-1]), dim=-1)
    for row, (sequence, values, ids) in enumerate(
        zip(sequences, top.values.tolist(), top.indices.tolist(), strict=True)
    ):
        sequence.likeliest.append(TokenLogp(own[row], list(zip(ids, values, strict=True))))
