"""Responses under way: what each is, and how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from steersman.rollout.port import Stepper
from steersman.rollout.sampling import Sampling
from steersman.types import Finish, Prompt, Sample


@dataclass(slots=True, frozen=True, eq=False)
class Drawing:
    """How some of the sequences are drawn, and what decodes them. With `likeliest`, each token's log-probability is
    noted, and those of so many likeliest tokens."""

    sampling: Sampling
    texts: Any
    likeliest: int | None = None


@dataclass(slots=True, frozen=True)
class TokenLogp:
    """A drawn token's log-probability (nats; temperature 1, nothing cut off) and the likeliest tokens with theirs."""

    logp: float
    others: list[tuple[int, float]]


@dataclass(slots=True)
class RunningResponse:
    """A response while it grows. `order` is its place in the result."""

    prompt: Prompt
    index: int
    order: int
    uniform: np.ndarray | None
    drawing: Drawing
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    support: list[Tensor] | None = None
    likeliest: list[TokenLogp] = field(default_factory=list)

    def sample(self, finish: Finish, text: str, version: int) -> Sample:
        """The response as it is now, drawn from weights of this version."""
        versions = [version] * len(self.ids)
        return Sample(self.prompt, self.ids, self.logp, finish, text, self.index, self.support, version=versions)


@dataclass(slots=True, frozen=True)
class ActionMask:
    """NLPO's masking policy: a token may be sampled only if it lies in this model's nucleus of mass `top_p`, or ends
    the response."""

    decoder: Stepper
    top_p: float
    min_tokens: int
