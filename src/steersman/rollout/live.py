"""A batch that never ends: requests join while others decode, each with a sampling of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from steersman.model.context import context_length
from steersman.rollout.batch import RunningBatch, not_finite
from steersman.rollout.engine import Engine
from steersman.rollout.port import Limits
from steersman.rollout.responses import Drawing, RunningResponse
from steersman.rollout.sampling import Sampling, uniforms
from steersman.types import Prompt, Sample, SteersmanError


@dataclass(slots=True, eq=False)
class Ticket:
    """One request under way. `changed` is called by the engine's thread after every step that gave it a token; then
    `ids[j]` are the tokens of its j-th sample so far, and `samples` those that are finished. `failure` ends it."""

    sequences: list[RunningResponse]
    changed: Callable[[], object]
    samples: dict[int, Sample] = field(default_factory=dict)
    failure: SteersmanError | None = None
    cancelled: bool = False

    @property
    def ids(self) -> list[list[int]]:
        return [sequence.ids for sequence in self.sequences]

    @property
    def done(self) -> bool:
        return self.failure is not None or self.cancelled or len(self.samples) == len(self.sequences)


class SharedBatch(RunningBatch):
    """A batch of requests that have nothing to do with each other: what fails one ends no other."""

    def begin(self) -> None:
        super().begin()
        self.failed: dict[int, SteersmanError] = {}

    def fail(self, sequence: RunningResponse) -> None:
        self.failed[sequence.order] = not_finite(sequence)


class QueueFullError(SteersmanError):
    """So many sequences wait already that another would wait too long."""


class Live:
    """Runs an engine's model in a thread of its own for as long as requests come.

    A request's tokens are those of `Engine.generate` for a prompt of the same ids and index, the same seed and
    sampling. Prompts have at most `longest` tokens, answers at most `new_tokens`; up to `rows` sequences are decoded
    together, and up to `queue` wait. The model's weights must not change before `close`.
    """

    def __init__(self, engine: Engine, *, rows: int, longest: int, new_tokens: int, queue: int) -> None:
        self.engine, self.longest, self.new_tokens, self.queue = engine, longest, new_tokens, queue
        self.limits = Limits(rows, engine.prefill_tokens, refill=1)
        self._lock = threading.Condition()
        self._arrived: list[Ticket] = []
        self._tickets: list[Ticket] = []
        self._closing = False
        self.live = self.tokens = 0
        self.context = context_length(engine.model)
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Sequences that have no row yet."""
        with self._lock:
            unfinished = sum(len(t.sequences) - len(t.samples) for t in [*self._arrived, *self._tickets])
        return max(0, unfinished - self.live)

    def room(self, prompt: int) -> int:
        """The longest answer to a prompt of so many tokens, at least 1."""
        return max(1, self.new_tokens if self.context is None else min(self.new_tokens, self.context - prompt))

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        changed: Callable[[], object],
        *,
        n: int = 1,
        seed: int = 0,
        likeliest: int | None = None,
    ) -> Ticket:
        """Takes a request in; with `likeliest`, log-probabilities are noted as `Drawing` says.

        Raises SteersmanError for what is too long, too much at once or not in the vocabulary, and QueueFullError
        where too many wait.
        """
        self._check(prompt, sampling, n)
        how = Drawing(sampling, self.engine.decoder.texts(self.engine.tokenizer, sampling.stop), likeliest)
        numbers = [self._numbers(sampling, prompt.index, j, seed) for j in range(n)]
        ticket = Ticket([RunningResponse(prompt, j, 0, u, how) for j, u in enumerate(numbers)], changed)
        if (waiting := self.waiting) + n > self.queue + self.limits.rows:
            raise QueueFullError(f"{waiting} sequences wait already, of {self.queue} that may; ask again later")
        with self._lock:
            if self._closing:
                raise SteersmanError("the model is being taken out of service; ask again")
            self._arrived.append(ticket)
            self._lock.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Frees the request's rows before the next step."""
        ticket.cancelled = True
        with self._lock:
            self._lock.notify()

    def close(self) -> None:
        """Finishes what was taken in, and ends; takes nothing more."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join()

    def _check(self, prompt: Prompt, sampling: Sampling, n: int) -> None:
        self.engine.check([prompt], sampling, n)
        for what, size, limit in (
            ("the prompt has", len(prompt.ids), self.longest),
            ("the answer may have", sampling.max_new_tokens, self.new_tokens),
        ):
            if size > limit:
                raise SteersmanError(f"{what} {size} tokens; this server takes at most {limit}")
        if n > (most := self.queue + self.limits.rows):
            raise SteersmanError(f"n is {n}; this server takes at most {most} answers at once")

    def _numbers(self, sampling: Sampling, index: int, j: int, seed: int) -> np.ndarray:
        if sampling.greedy:
            return np.zeros(self.new_tokens, dtype=np.float32)
        return uniforms(seed, index, 0, j, self.new_tokens)

    def _run(self) -> None:
        with self.engine.alone():
            while self._wait():
                try:
                    self._serve()
                except Exception as error:  # whatever it is, those who wait are told, and the next batch begins anew
                    self._fail(error)

    def _wait(self) -> bool:
        """Blocks until there is something to do; False when closed and all is done."""
        with self._lock:
            self._lock.wait_for(lambda: self._arrived or self._closing)
            return bool(self._arrived)

    def _serve(self) -> None:
        """Decodes until nothing is left to do."""
        batch = SharedBatch(self.engine, Sampling(self.new_tokens), self.limits)
        batch.longest, batch.total = self.longest, self.limits.rows + 1
        with batch.opened():
            batch.begin()
            while True:
                self._admit(batch)
                if not batch.busy:
                    return
                batch.advance()
                self.live, self.tokens, batch.tokens = len(batch.live), self.tokens + batch.tokens, 0
                self._tell(batch)

    def _admit(self, batch: SharedBatch) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for ticket in arrived:
            for sequence in ticket.sequences:
                sequence.order = batch.next_order()
            batch.waiting.append((ticket.sequences[0].prompt, ticket.sequences))
        with self._lock:
            self._tickets += arrived
            over = [t for t in self._tickets if t.cancelled or t.failure is not None]
            gone = {id(s) for t in over for s in t.sequences}
            self._tickets = [t for t in self._tickets if t not in over]
        if gone:
            batch.drop(gone)
            self.live = len(batch.live)

    def _tell(self, batch: SharedBatch) -> None:
        for ticket in list(self._tickets):
            for sequence in ticket.sequences:
                if (sample := batch.done.pop(sequence.order, None)) is not None:
                    ticket.samples[sequence.index] = sample
                ticket.failure = batch.failed.pop(sequence.order, ticket.failure)
            ticket.changed()
        with self._lock:
            self._tickets = [t for t in self._tickets if t.cancelled or t.failure is not None or not t.done]

    def _fail(self, error: Exception) -> None:
        failure = error if isinstance(error, SteersmanError) else SteersmanError(f"decoding failed: {error}")
        with self._lock:
            failed, self._arrived, self._tickets, self.live = [*self._tickets, *self._arrived], [], [], 0
        for ticket in failed:
            ticket.failure = failure
            ticket.changed()
