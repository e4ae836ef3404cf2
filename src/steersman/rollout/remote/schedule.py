"""Batches that are begun before their turn, each sampled in order by the weights that are its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, TypeVar

from steersman.rollout.port import Limits
from steersman.rollout.remote.generator import RemoteGenerator
from steersman.rollout.remote.snapshot import Snapshot
from steersman.rollout.sampling import Sampling
from steersman.types import Progress, Prompt, Sample, Stats, SteersmanError

T = TypeVar("T")


class Schedule:
    """What stands in the generator's place for the loop: it knows which weights which batch is sampled by.

    `generate`, which the loop calls for held-out prompts, waits until all that was begun is sampled, and uses the
    newest weights. `update_weights` publishes them; with `cut` it loads them at once.
    """

    def __init__(self, engine: RemoteGenerator, ahead: int, *, cut: bool) -> None:
        self.engine, self.ahead, self.cut = engine, ahead, cut
        self.stats: Stats = {}
        self.published: dict[int, Snapshot] = {}
        self.newest, self.loaded = 0, -1
        self._changed, self._next, self._begun, self._closed = threading.Condition(), 0, 0, False
        self._there: frozenset[int] = frozenset()
        self._weights = threading.RLock()
        self._pool = ThreadPoolExecutor(ahead + 1, thread_name_prefix="ahead")

    def begin(self, batch: int, make: Callable[[], T]) -> Future[T]:
        """Makes the batch in a thread; it is sampled after all that were begun before."""
        self._begun = batch + 1
        return self._pool.submit(make)

    def restart_at(self, batch: int, there: Collection[int] = ()) -> None:
        """Nothing is under way, and the next batch to be sampled is this one; those in `there` have their samples."""
        self._next, self._begun, self._there = batch, batch, frozenset(there)

    def sample(self, batch: int, work: Callable[[], T]) -> T:
        """Does the batch's sampling when it is its turn, by the weights that are its own."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == batch or self._closed)
        if self._closed:
            raise SteersmanError("the run has ended, and its servers with it")
        try:
            self._use(self.newest if self.cut else max(0, batch - self.ahead))
            return work()
        finally:
            with self._changed:
                self._next = next(n for n in count(batch + 1) if n not in self._there)
                self._changed.notify_all()

    def drain(self) -> None:
        """Waits until all that was begun is sampled."""
        with self._changed:
            self._changed.wait_for(lambda: self._next >= self._begun or self._closed)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int = 1, seed: int | Sequence[int] = 0,
        record_support: bool = False, progress: Progress | None = None,
    ) -> list[Sample]:  # fmt: skip
        self.drain()
        self._use(self.newest)
        return self.engine.generate(
            prompts, sampling, n=n, seed=seed, record_support=record_support, progress=progress
        )

    def joinable(self, sampling: Sampling, **room: Any) -> None:
        """Batches are sampled whole, ahead of their use."""

    def prepare(self, longest: int) -> None:
        self._use(self.newest)
        self.engine.prepare(longest)

    def update_weights(self, version: int) -> Stats:
        self.published[version] = self.engine.publish(version)
        self.newest = version
        if self.cut:
            self._use(version)
        return dict(self.stats)

    def limits(self, sequences: int) -> Limits:
        return self.engine.limits(sequences)

    def close(self) -> None:
        """Ends the servers; what is under way ends with an error that nobody waits for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.engine.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _use(self, version: int) -> None:
        """Loads the version, or the oldest that is newer where a resumed run no longer has it."""
        with self._weights:
            if not self.published:
                self.update_weights(0)
            wanted = min((v for v in self.published if v >= version), default=self.newest)
            if wanted == self.loaded:
                return
            self.stats = self.engine.load(self.published[wanted], cut=self.cut)
            self.loaded = wanted
            for old in [v for v in self.published if v < wanted]:
                self.published.pop(old).drop()
