"""The recipe's judge section."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.reward import RewardPart

RUBRIC = "Judge how helpful, correct and well written the answer is. Do not favour length."
"""What a judge looks at where a recipe does not say."""


class AddressConfig(Section):
    """A server that speaks the OpenAI protocol, and how patiently it is asked."""

    url: str = Field(description="address up to the version, such as http://localhost:8000/v1")
    model: str = Field(description="name of the model, as the endpoint knows it; replies are cached under it")
    key_env: str = Field(
        default="OPENAI_API_KEY", description="environment variable with the key; unset: none is sent"
    )
    extra: dict[str, Any] = Field(
        default_factory=dict, description="further fields of the request, such as {seed: 0}"
    )
    timeout: float = Field(default=60.0, gt=0, description="seconds that a request and its whole reply may take")
    retries: int = Field(
        default=5, ge=0, description="further tries after a time-out, status 429 or 5xx, or a lost connection"
    )
    max_wait: float = Field(default=60.0, gt=0, description="longest pause between tries, in seconds")
    concurrency: int = Field(default=8, ge=1, description="requests under way at once")


class EndpointConfig(AddressConfig):
    """A judge behind an OpenAI-compatible chat endpoint."""

    temperature: float = Field(default=0.0, ge=0, description="sampling temperature of the judge; 0: greedy")
    max_tokens: int = Field(default=512, ge=1, description="longest reply, in tokens")


class LocalConfig(Section):
    """A judge that is a causal model on this machine."""

    path: str = Field(description="folder or hub name of the model")
    read: Literal["logp", "text"] = Field(
        default="logp",
        description="logp: compare the log-probabilities of the possible verdicts; text: let the model write a "
        "reply, and read the verdict in it",
    )
    max_tokens: int = Field(default=128, ge=1, description="longest reply, in tokens, where it writes one")
    batch: int = Field(default=32, ge=1, description="questions that it reads at once")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")


class JudgeConfig(Section):
    """Who decides which answer is better: exactly one of endpoint, local and reward."""

    endpoint: EndpointConfig | None = Field(default=None, description="a model behind an OpenAI-compatible endpoint")
    local: LocalConfig | None = Field(default=None, description="a model on this machine")
    reward: dict[str, RewardPart] = Field(
        default_factory=dict, description="name: reward model, function or builtin; summed as in a reward section"
    )
    rubric: str = Field(
        default=RUBRIC,
        description="what the judge looks at",
    )
    compare: str | None = Field(
        default=None,
        description="template with {rubric}, {prompt}, {first}, {second} and {code}, a code that no answer can know, "
        "for the tags around them; null: the built-in one",
    )
    grade: str | None = Field(
        default=None,
        description="template with {rubric}, {prompt}, {answer}, {code}, {low} and {high}; null: the built-in one",
    )
    scale: tuple[int, int] = Field(default=(1, 10), description="lowest and highest grade")
    tie_margin: float = Field(
        default=0.0,
        ge=0,
        description="a lead up to this is a tie: in reward, or with local and read: logp in log-probability",
    )
    on_unparsable: Literal["drop", "tie", "stop"] = Field(
        default="drop",
        description="a reply without a verdict. drop: leave the question out; tie: count it as a tie, or as the "
        "middle of the scale; stop: end with an error",
    )
    on_failed: Literal["drop", "stop"] = Field(
        default="drop",
        description="a question that gets no reply: refused (status 400, 413 or 422), too long for a local judge, or "
        "without a whole reply after all tries. drop: leave it out and name it, but stop where ten that were not "
        "refused fail in a row, or where the judge replies to none; stop: end with an error",
    )
    max_calls: int | None = Field(
        default=None,
        ge=1,
        description="budget: largest number of replies, counting those that the cache already holds",
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="budget: largest number of tokens of requests and replies, counted alike"
    )
    on_budget: Literal["stop", "drop"] = Field(
        default="stop",
        description="when the budget is spent. stop: end the run (what was judged is kept); drop: leave the rest "
        "unjudged",
    )
    cache: str | None = Field(
        default=None, description="file of replies, shared between runs; null: judge.jsonl in the run folder"
    )

    def reward_model(self) -> tuple[str, str]:
        """The name and the path of the reward model that decides. Raises ValueError where it is not exactly one."""
        found = [(name, part.model) for name, part in self.reward.items() if part.model is not None]
        if len(found) != 1:
            raise ValueError(f"judge.reward: {len(found)} reward models, and exactly one can be trained again")
        return found[0]

    @model_validator(mode="after")
    def _fits(self) -> JudgeConfig:
        given = [name for name in ("endpoint", "local", "reward") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of endpoint, local and reward; {' and '.join(given) or 'none'} given")
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale {list(self.scale)}: the lowest grade must be below the highest")
        needs = {"compare": ("prompt", "first", "second"), "grade": ("prompt", "answer")}
        for name, holes in needs.items():
            template = getattr(self, name)
            missing = [h for h in holes if template is not None and not re.search(rf"\{{{h}\}}", template)]
            if missing:
                raise ValueError(f"{name}: the template has no {{{missing[0]}}}, so the judge would not see it")
        return self
