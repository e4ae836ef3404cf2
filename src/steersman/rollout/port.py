"""What any generation engine offers, so that another one can take this one's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from steersman.rollout.sampling import Sampling
from steersman.types import Prompt, Sample

Progress = Callable[[int, int, int], None]
"""Called with (finished samples, all samples, tokens so far)."""


class Generator(Protocol):
    """Turns prompts into samples, `n` per prompt, those of the first prompt first."""

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

    def update_weights(self) -> None:
        """Take over the policy's current weights; nothing to do for an engine that runs the policy itself."""
        ...
