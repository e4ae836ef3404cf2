"""What a client may ask, in OpenAI's words; everything else is refused by name."""

from __future__ import annotations

import random
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from steersman.data import Layout
from steersman.data.examples import Message as Turn
from steersman.ops.distributions import LEAST_TEMPERATURE
from steersman.rollout import Sampling

MOST_LIKELIEST = 20
"""Tokens that are listed beside each token at most."""
MOST_STOPS, LONGEST_STOP = 16, 256
"""Stop strings of one request, and characters of one. Each is looked for behind every token, in the loop that all
requests share."""


class Asked(BaseModel):
    """What a client sends. As in OpenAI's protocol, null is what was not said; what is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, told: Any) -> Any:
        if not isinstance(told, dict):
            return told
        return {key: value for key, value in told.items() if value is not None or key not in cls.model_fields}


class TextPart(Asked):
    """A part of a turn that is text; the parts of a turn are put together as they are."""

    type: Literal["text"]
    text: str


class Message(Asked):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is read as system")
    content: str | list[TextPart]

    def turn(self) -> Turn:
        """As a chat template reads it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


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
    stop: str | list[str] | None = Field(
        default=None, description=f"at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters"
    )
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: float = Field(default=0.0, ge=0, le=0, description="0 is all that is taken")
    presence_penalty: float = Field(default=0.0, ge=0, le=0, description="0 is all that is taken")
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=0, description="{} is all that is taken")

    @model_validator(mode="after")
    def _nothing_unread(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; ask for stream: true as well")
        return self

    @field_validator("temperature")
    @classmethod
    def _greedy_or_finite(cls, temperature: float) -> float:
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"0 is greedy; any other is at least {LEAST_TEMPERATURE}")
        return temperature

    @field_validator("stop")
    @classmethod
    def _few_and_short(cls, stop: str | list[str] | None) -> str | list[str] | None:
        given = [stop] if isinstance(stop, str) else stop or []
        if len(given) > MOST_STOPS:
            raise ValueError(f"{len(given)} stop strings; at most {MOST_STOPS} are taken")
        longest = max(map(len, given), default=0)
        if longest > LONGEST_STOP:
            raise ValueError(f"a stop string has {longest:,} characters; at most {LONGEST_STOP} are taken")
        return stop

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

    @model_validator(mode="after")
    def _nothing_unread_in_chats(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is listed beside log-probabilities; ask for logprobs: true as well")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens are one limit under two names; give one of them")
        return self

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def encode(self, layout: Layout) -> tuple[list[int], str]:
        return layout.prompt([m.turn() for m in self.messages])


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
