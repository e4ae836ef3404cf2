"""A metric spread over worker processes, scores in the texts' order."""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from multiprocessing import get_context
from typing import Any

import torch

from steersman.metrics.core import Better, Corpus, Metric, MetricInput, Scorer, finite
from steersman.metrics.named import metric
from steersman.types import SteersmanError


class Parallel(Scorer):
    """The metric of that name and settings, each batch cut into as many runs of rows as there are workers.

    Worth it for metrics of plain Python (TER, METEOR, math_answer, ifeval): a model is better left in one process.
    Processes are started fresh, so a script that uses it needs `if __name__ == "__main__":`. Scores are those of
    one process, unless a metric looks across the rows of a batch, which only `cider` without a corpus file does.
    """

    def __init__(self, name: str, settings: Mapping[str, Any] | None = None, workers: int = 2):
        self.inner = metric(name, settings)
        if not isinstance(self.inner, Scorer):
            raise SteersmanError(f"metric '{name}': only a subclass of steersman.metrics.Scorer can have workers")
        self.made_of, self.workers = (name, dict(settings or {})), workers
        self.name, self.needs, self.per_sample = self.inner.name, self.inner.needs, self.inner.per_sample
        self.scores_empty = self.inner.scores_empty
        self.empty_reference = self.inner.empty_reference

    @property
    def better(self) -> Better:  # type: ignore[override]
        return self.inner.better

    @property
    def implementation(self) -> str:
        return f"{self.inner.implementation}; {self.workers} workers"

    def wrong_with(self, need: str, value: Any) -> str:
        return self.inner.wrong_with(need, value)

    def rows(self, batch: MetricInput) -> Sequence[float]:
        n = len(batch.texts)
        step = -(-n // self.workers)
        starts = range(0, n, step)
        parts = [batch.rows(range(start, min(start + step, n))) for start in starts]
        pool = self._pool
        try:
            tasks = [pool.submit(_score, part, start) for part, start in zip(parts, starts, strict=True)]
            return [score for task in tasks for score in task.result()]
        except (BrokenProcessPool, KeyboardInterrupt) as error:  # Ctrl-C in a terminal ends the workers as well
            del self._pool
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise SteersmanError(f"metric '{self.name}': a worker process died; set workers to 0") from error

    def over(self, batch: MetricInput) -> Corpus:
        assert isinstance(self.inner, Scorer)
        return self.inner.over(batch)

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _start, self.made_of)
        atexit.register(pool.shutdown, cancel_futures=True)
        return pool


_worker: Metric | None = None


def _start(name: str, settings: Mapping[str, Any]) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = metric(name, settings)


def _score(batch: MetricInput, first: int) -> list[float]:
    """Scores of a run of rows; a row that a message names is counted from the whole batch's start."""
    assert isinstance(_worker, Scorer)
    try:
        return finite(_worker.name, _worker.rows(batch), len(batch.texts))
    except SteersmanError as error:
        where = "" if first == 0 else f" (counted from row {first} of the batch)"
        raise SteersmanError(f"{error}{where}") from None
