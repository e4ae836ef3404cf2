"""What a client may ask, in OpenAI's words; everything else is refused by name."""

from __future__ import annotations

import random
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from steersman.data import Layout
from steersman.ops.distributions import LEAST_TEMPERATURE
from steersman.rollout import Sampling

MOST_LIKELIEST = 20
"""Tokens that are listed beside each token at most."""


class Asked(BaseModel):
    """What a client sends. As in OpenAI's protocol, null is what was not said; what is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, told: Any) -> Any:
        if not isinstance(told, dict):
            return told
        return {key: value for key, value in told.items() if value is not None or key not in cls.model_fields}


class Message(Asked):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class StreamOptions(Asked):
    """What a stream ends with."""

    include_usage: bool = False


class Ask(Asked):
    """What both kinds of request share. `user` decides which model of an A/B test answers, and is not kept."""

    chat: ClassVar[bool] = False
    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=64)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @field_validator("temperature")
    @classmethod
    def _greedy_or_finite(cls, temperature: float) -> float:
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"0 is greedy; any other is at least {LEAST_TEMPERATURE}")
        return temperature

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are listed with each token; None: no log-probabilities are asked for."""
        raise NotImplementedError

    def encode(self, layout: Layout) -> tuple[list[int], str]:
        """The request as the model reads it: ids, and their text."""
        raise NotImplementedError

    def sampling(self, room: int) -> Sampling:
        """How the answer is drawn; `room` is how long it may be at most."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            self.answer_tokens or room, self.temperature, self.top_k, self.top_p, self.min_p, stop=stop
        )  # fmt: skip

    def own_seed(self) -> int:
        """The seed asked for, or one that nobody chose."""
        return random.SystemRandom().getrandbits(31) if self.seed is None else self.seed


class ChatAsk(Ask):
    """POST /v1/chat/completions."""

    chat: ClassVar[bool] = True
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LIKELIEST)

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def encode(self, layout: Layout) -> tuple[list[int], str]:
        return layout.prompt([{"role": m.role, "content": m.content} for m in self.messages])


class TextAsk(Ask):
    """POST /v1/completions."""

    prompt: str = Field(min_length=1)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LIKELIEST)

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    def encode(self, layout: Layout) -> tuple[list[int], str]:
        return layout.codec.begin(self.prompt), self.prompt


def fault(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
