"""What any generation engine offers, so that another one can take this one's place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from steersman.rollout.sampling import Sampling
from steersman.types import Progress, Prompt, Sample, Stats


@dataclass(slots=True, frozen=True)
class Limits:
    """Rows of the live cache, tokens of one prefill (padding counted), and free rows from which a refill pays."""

    rows: int
    prefill_tokens: int
    refill: int


class Stepper(Protocol):
    """What reads prompts and steps through responses with one model: a causal decoder, or an encoder-decoder.

    `live` is the cache of all live rows; `prefill` makes what its `admit` takes.
    """

    @property
    def model(self) -> Any: ...

    @property
    def live(self) -> Any: ...

    @property
    def one_length(self) -> bool:
        """Whether the prompts of one prefill must have one length."""
        ...

    def prepared(self, rows: int, steps: int) -> AbstractContextManager[None]:
        """While open, during which no weight changes: up to `steps` steps of up to `rows` rows."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, Tensor]:
        """What was made of right-padded prompts, and the logits [B, V] of each one's first response token."""
        ...

    def step(self, ids: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Logits [B, V] after feeding each live row one token; ids and positions (prompt counted) are [B, 1]."""
        ...

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Raises SteersmanError unless the prompt and `new_tokens` fit."""
        ...

    def texts(self, tokenizer: Any, stop: tuple[str, ...]) -> Any:
        """What decodes responses and finds stop strings in them."""
        ...


class Joinable(Protocol):
    """A batch that prompts join while it decodes. Who joins when is the caller's to say, and so what is computed
    together."""

    @property
    def room(self) -> int:
        """Rows that may be given away now."""
        ...

    @property
    def busy(self) -> bool:
        """Whether anything is decoded."""
        ...

    def join(self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> list[int]:
        """Lets at most `room` prompts in, each with its seed; returns the numbers by which `advance` names them."""
        ...

    def advance(self) -> dict[int, Sample]:
        """Decodes one token of every row; the samples that it finished, by number."""
        ...


class Generator(Protocol):
    """Turns prompts into samples, `n` per prompt, those of the first prompt first.

    What may be sampled is all in `Sampling`, another model's limit included. `setup/generators.py: open_generator`
    makes the one that a recipe asks for.
    """

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        record_support: bool = False,
        progress: Progress | None = None,
    ) -> list[Sample]: ...

    def joinable(
        self, sampling: Sampling, *, rows: int, longest: int, sequences: int, record_support: bool
    ) -> AbstractContextManager[Joinable] | None:
        """A running batch of at most `rows` rows for prompts of up to `longest` tokens, of which about `sequences`
        are sampled at a time; None where it samples in whole calls only."""
        ...

    def prepare(self, longest: int) -> None:
        """Gets ready to sample, before anything else is begun: prompts with their answers have `longest` tokens
        together at most. Raises SteersmanError where what samples can not do so."""
        ...

    def update_weights(self, version: int) -> Stats:
        """Takes over the policy's current weights as `version`, which samples carry from now on. It is called after
        each update; an engine that runs the policy itself has nothing to copy. Returns numbers to be logged."""
        ...

    def limits(self, sequences: int) -> Limits:
        """What of this process's memory a call of so many sequences takes, for the forecast."""
        ...

    def close(self) -> None:
        """Gives back what it holds: memory, or processes that it started."""
        ...
