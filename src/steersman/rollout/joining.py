"""A batch that prompts join while others decode, at moments that the caller chooses: for the turns of episodes.

What is computed together depends on who joined when. A caller that decides it by what was sampled, and never by the
clock, gets the same numbers bit for bit in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from steersman.rollout.batch import RunningBatch
from steersman.rollout.port import Limits
from steersman.rollout.responses import RunningResponse
from steersman.rollout.sampling import Sampling, uniforms
from steersman.types import Prompt, Sample

if TYPE_CHECKING:
    from steersman.rollout.engine import Engine


class JoinableBatch:
    """Replies that one engine decodes together; `joinable` opens it. Weights must not change meanwhile."""

    def __init__(self, engine: Engine, batch: RunningBatch, sampling: Sampling) -> None:
        self.engine, self.batch, self.sampling = engine, batch, sampling

    @property
    def room(self) -> int:
        """Rows that may be given away now: 0 while so few are free that letting prompts in does not pay."""
        live, limits = len(self.batch.live), self.batch.limits
        free = limits.rows - live
        return free if not live or free >= limits.refill else 0

    @property
    def busy(self) -> bool:
        """Whether anything is decoded."""
        return self.batch.busy

    def join(self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> list[int]:
        """Lets prompts in, at most `room` of them; each has random numbers of its own, named by its seed and index.

        Returns the numbers by which `advance` names their samples. Raises SteersmanError as `Engine.generate` does.
        """
        self.engine.check(prompts, self.sampling, 1)
        batch, made = self.batch, []
        for prompt, seed in zip(prompts, seeds, strict=True):
            luck = None if self.sampling.greedy else uniforms(seed, prompt.index, 0, 0, self.sampling.max_new_tokens)
            support = [] if batch.next_token.record else None
            made.append(RunningResponse(prompt, 0, batch.next_order(), luck, batch.drawing, support=support))
        alike: dict[tuple[int, ...], list[RunningResponse]] = {}
        for response in sorted(made, key=lambda r: -len(r.prompt.ids)):
            alike.setdefault(tuple(response.prompt.ids), []).append(response)
        batch.waiting.extend((group[0].prompt, group) for group in alike.values())  # read once, however many ask it
        return [r.order for r in made]

    def advance(self) -> dict[int, Sample]:
        """Decodes one token of every row; returns the samples that it finished, by their numbers, in order."""
        self.batch.advance()
        done, self.batch.done = self.batch.done, {}
        return dict(sorted(done.items()))


@contextmanager
def joinable(
    engine: Engine, sampling: Sampling, *, rows: int, longest: int, sequences: int, record_support: bool
) -> Iterator[JoinableBatch]:
    """A running batch of `rows` rows for prompts of at most `longest` tokens, of which about `sequences` will come.

    Raises SteersmanError where the engine samples for somebody else already.
    """
    with engine.alone():
        limits = Limits(rows, engine.prefill_tokens, refill=max(1, rows // 8))
        batch = RunningBatch(engine, sampling, limits, record_support=record_support)
        batch.longest, batch.total = longest, max(sequences, rows + 1)
        with batch.opened():
            batch.begin()
            yield JoinableBatch(engine, batch, sampling)
