"""One call of the engine: sequences wait, are prefilled, decode in the live cache, and leave.

Prompts are prefilled longest first, several to a forward and each once however often it is sampled; the first
token of every sample comes from that forward. Prefilled sequences take free rows. Each step feeds every live row
its last token; rows that finish leave at once and the last rows move into their places, so that only live rows
are ever computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from steersman.rollout.decoder import generating
from steersman.rollout.next_token import Drawn, NextToken
from steersman.rollout.port import Limits
from steersman.rollout.responses import Drawing, RunningResponse
from steersman.rollout.sampling import Sampling, uniforms
from steersman.types import Progress, Prompt, Sample, SteersmanError, send

if TYPE_CHECKING:
    from steersman.rollout.engine import Engine


@dataclass(slots=True)
class Prefilled:
    """A prefilled sequence with its first token, waiting for a row: row `row` of each decoder's prompt cache."""

    sequence: RunningResponse
    caches: list[Any]
    row: int


def live_cache_size(rows: int, longest: int, new_tokens: int, sequences: int) -> tuple[int, int]:
    """Rows and columns of the live cache for prompts up to `longest`; where rows are refilled, some columns more, so
    that it seldom rewinds."""
    length = longest + new_tokens
    slack = max(64, length // 4) if sequences > rows else 0
    return rows, -(-(length + slack) // 16) * 16


def prefill_size(rows: int, longest: int, per_prompt: int, tokens: int) -> int:
    """Tokens of the largest prefill, of up to `tokens`, for prompts up to `longest`: no more prompts are read than
    rows can take, each giving `per_prompt`."""
    return min(max(tokens, longest), max(1, rows // per_prompt) * longest)


def not_finite(sequence: RunningResponse) -> SteersmanError:
    return SteersmanError(
        f"rollout: the policy's logits are not finite at token {len(sequence.ids)} of the response to prompt "
        f"{sequence.prompt.index}; its weights hold NaN or Inf, go back to a checkpoint"
    )


class RunningBatch:
    """Sequences that an engine decodes together. It decodes while it is `opened`; `run` returns the finished samples
    in order. `cut` is asked between steps whether to stop there."""

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        limits: Limits,
        *,
        record_support: bool = False,
        progress: Progress | None = None,
        cut: Callable[[], bool] | None = None,
    ) -> None:
        decoder = engine.decoder
        action_mask = None if sampling.limit is None else engine.action_mask(sampling.limit)
        self.decoders = [decoder] if action_mask is None else [decoder, action_mask.decoder]
        self.one_length = any(one.one_length for one in self.decoders)
        self.sampling, self.limits, self.progress = sampling, limits, progress
        self.drawing = Drawing(sampling, decoder.texts(engine.tokenizer, sampling.stop))
        self.is_cut = cut or (lambda: False)
        self.device = decoder.model.device
        self.next_token = NextToken(
            sampling, engine.end_ids, known=engine.vocabulary,
            width=decoder.model.get_output_embeddings().weight.shape[0], record=record_support,
            action_mask=action_mask, version=engine.version, device=self.device,
        )  # fmt: skip
        self.waiting: deque[tuple[Prompt, list[RunningResponse]]] = deque()
        self.prefilled: deque[Prefilled] = deque()
        self.live: list[RunningResponse] = []
        self.done: dict[int, Sample] = {}
        self.tokens = self.total = self.longest = self.orders = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While open, the models generate and their caches have room; at the end the room is given back, since what
        comes next, such as an update, needs the memory."""
        with generating(*(decoder.model for decoder in self.decoders)), ExitStack() as stack:
            for decoder in self.decoders:
                stack.enter_context(decoder.prepared(self.limits.rows, self.sampling.max_new_tokens))
                stack.callback(decoder.live.release)
            yield

    def run(self, prompts: Sequence[Prompt], n: int, seed: int | Sequence[int]) -> list[Sample]:
        self._enqueue(prompts, n, seed)
        self.begin()
        while self.busy:
            if self.is_cut():
                self._file_unfinished()
                break
            self.advance()
            if self.progress is not None:
                self.progress(len(self.done), self.total, self.tokens)
        return [self.done[order] for order in range(self.total)]

    def begin(self) -> None:
        """Room for what each row needs; the prompts that will come are known to be no longer than `longest`."""
        rows, width = self.limits.rows, self.sampling.max_new_tokens
        self.position = torch.zeros(2, rows, dtype=torch.long, device=self.device)  # of the next token; tokens drawn
        self.last = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.uniform = None if self.sampling.greedy else torch.zeros(rows, width, device=self.device)
        for decoder in self.decoders:
            decoder.live.clear(self.longest)

    @property
    def busy(self) -> bool:
        """Whether any sequence waits, is prefilled or is decoded."""
        return bool(self.waiting or self.prefilled or self.live)

    def advance(self) -> None:
        """Lets sequences in where rows are free, and decodes one token of every live row."""
        free = self.limits.rows - len(self.live)
        if (self.waiting or self.prefilled) and (not self.live or free >= self.limits.refill):
            self._refill(free)
        if self.live:
            self._step()

    def _enqueue(self, prompts: Sequence[Prompt], n: int, seed: int | Sequence[int]) -> None:
        met: dict[int, int] = {}
        for place, prompt in enumerate(prompts):
            occurrence = met[prompt.index] = met.get(prompt.index, -1) + 1
            group = []
            for j in range(n):
                u = None
                if not self.sampling.greedy:
                    u = uniforms(seed, prompt.index, occurrence, j, self.sampling.max_new_tokens)
                support = [] if self.next_token.record else None
                group.append(RunningResponse(prompt, j, place * n + j, u, self.drawing, support=support))
            self.waiting.append((prompt, group))
        self.waiting = deque(sorted(self.waiting, key=lambda item: -len(item[0].ids)))
        self.total = len(prompts) * n
        self.longest = max(len(prompt.ids) for prompt in prompts)

    def next_order(self) -> int:
        """A place in the result for a sequence that joins later."""
        self.orders += 1
        return self.orders - 1

    def drop(self, gone: set[int]) -> None:
        """Takes sequences out wherever they are, by their `id`; their rows are free."""
        self.waiting = deque(
            (prompt, kept) for prompt, group in self.waiting if (kept := [s for s in group if id(s) not in gone])
        )
        self.prefilled = deque(entry for entry in self.prefilled if id(entry.sequence) not in gone)
        rows = {row for row, sequence in enumerate(self.live) if id(sequence) in gone}
        if rows:
            self._leave(rows)

    # -- admission -----------------------------------------------------------------------------------------

    def _refill(self, free: int) -> None:
        """Lets up to `free` sequences in. The caches of one prefill are there at a time."""
        while free and (self.prefilled or self.waiting):
            if not self.prefilled:
                self._prefill()
            entering = [self.prefilled.popleft() for _ in range(min(free, len(self.prefilled)))]
            for _, group in groupby(entering, key=lambda r: len(r.sequence.prompt.ids)):
                self._admit(list(group))
            free -= len(entering)

    def _prefill(self) -> None:
        """Read the next prompts and draw the first token of each of their samples."""
        width, chunk, count = len(self.waiting[0][0].ids), [], 0
        while self.waiting:
            more, width = len(self.waiting[0][1]), max(width, len(self.waiting[0][0].ids))
            full = (len(chunk) + 1) * width > self.limits.prefill_tokens or count + more > self.limits.rows
            other = self.one_length and chunk and len(self.waiting[0][0].ids) != len(chunk[0][0].ids)
            if chunk and (full or other):
                break
            chunk.append(self.waiting.popleft())
            count += more
        read = [decoder.prefill([prompt.ids for prompt, _ in chunk]) for decoder in self.decoders]
        caches = [cache for cache, _ in read]
        entries = [Prefilled(s, caches, row) for row, (_, group) in enumerate(chunk) for s in group]
        for at in range(0, len(entries), self.limits.rows):
            some = entries[at : at + self.limits.rows]
            rows = send(torch.tensor([entry.row for entry in some]), self.device)
            uniform = None
            if not self.sampling.greedy:
                uniform = self._to_device(np.array([entry.sequence.uniform[0] for entry in some]))  # type: ignore[index]
            sequences = [entry.sequence for entry in some]
            drawn = self._draw([logits[rows] for _, logits in read], sequences, uniform)
            left = {*drawn.finished, *drawn.broken}
            self.prefilled.extend(entry for i, entry in enumerate(some) if i not in left)

    def _admit(self, entries: list[Prefilled]) -> None:
        """Give rows to sequences that share a prefill and a prompt length."""
        at, count = len(self.live), len(entries)
        length = len(entries[0].sequence.prompt.ids)
        source = torch.tensor([entry.row for entry in entries])
        if not at and self.decoders[0].live.rows == 0:
            for decoder in self.decoders:
                decoder.live.clear(self.longest)
        for decoder, cache in zip(self.decoders, entries[0].caches, strict=True):
            decoder.live.reserve(*self._live_cache_size(), cache)
            decoder.live.admit(cache, source, length)
        rows = slice(at, at + count)
        sequences = [entry.sequence for entry in entries]
        self.position[0, rows] = length
        self.position[1, rows] = 1
        self.last[rows] = send(torch.tensor([s.ids[-1] for s in sequences]), self.device)
        if self.uniform is not None:
            self.uniform[rows] = self._to_device(np.stack([s.uniform for s in sequences]))  # type: ignore[misc]
        self.live += sequences

    def _live_cache_size(self) -> tuple[int, int]:
        return live_cache_size(self.limits.rows, self.longest, self.sampling.max_new_tokens, self.total)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return send(torch.from_numpy(array), self.device)

    # -- decoding ------------------------------------------------------------------------------------------

    def _step(self) -> None:
        count = len(self.live)
        ids, position = self.last[:count, None], self.position[:, :count]
        logits = [decoder.step(ids, position[0, :, None], self.longest) for decoder in self.decoders]
        uniform = None
        if self.uniform is not None:
            uniform = self.uniform[:count].gather(1, position[1, :, None]).squeeze(1)
        drawn = self._draw(logits, self.live, uniform)
        position += 1
        self.last[:count] = drawn.tokens
        for decoder in self.decoders if drawn.broken else ():
            decoder.live.wipe(drawn.broken)
        if left := {*drawn.finished, *drawn.broken}:
            self._leave(left)

    def _draw(self, logits: list[Tensor], sequences: list[RunningResponse], uniform: Tensor | None) -> Drawn:
        """Draws a token for each sequence; the samples that ended are filed."""
        drawn = self.next_token.draw(logits, sequences, uniform)
        self.tokens += len(sequences)
        for row, sample in drawn.finished.items():
            self.done[sequences[row].order] = sample
        for row in drawn.broken:
            self.fail(sequences[row])
        return drawn

    def fail(self, sequence: RunningResponse) -> None:
        """What becomes of a sequence whose logits are not finite: none of the call is worth anything then."""
        raise not_finite(sequence)

    def _file_unfinished(self) -> None:
        """Files every response that has not ended, as far as it is; its text is left out."""
        waiting = [sequence for _, group in self.waiting for sequence in group]
        for s in [*waiting, *(entry.sequence for entry in self.prefilled), *self.live]:
            self.done[s.order] = s.sample("length", "", self.next_token.version)

    def _leave(self, finished: set[int]) -> None:
        """Drop finished rows; the last live rows take their places."""
        rows = len(self.live) - len(finished)
        holes = [i for i in sorted(finished) if i < rows]
        movers = [i for i in range(rows, len(self.live)) if i not in finished]
        moves = list(zip(holes, movers, strict=True))
        for decoder in self.decoders:
            decoder.live.keep(rows, moves)
        if moves:
            to, source = send(torch.tensor([holes, movers]), self.device)
            self.position[:, to] = self.position[:, source]
            self.last[to] = self.last[source]
            if self.uniform is not None:
                self.uniform[to] = self.uniform[source]
        for hole, mover in moves:
            self.live[hole] = self.live[mover]
        del self.live[rows:]
