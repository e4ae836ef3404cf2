"""A simulated user as an environment: the actor talks, the user answers, and the outcome is judged.

    environment:
      path: steersman.environments.dialogue:Dialogue
      args: {user: {path: MODEL}, judge: {endpoint: {url: "http://localhost:8000/v1", model: judge}}}

A data row says who the user is: `opening` (the first message, added to the prompt), `character` and `goal` for a user
that a model plays, `facts` (sentences) for one that follows a script, `values` (words) that a good last reply names.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

from pydantic import Field, ValidationError, model_validator

from steersman.config.sections import Section
from steersman.data import Layout, template_ends
from steersman.data.examples import Message
from steersman.environments.calls import without_thoughts
from steersman.judge.config import EndpointConfig, JudgeConfig
from steersman.judge.endpoint import Endpoint
from steersman.judge.judge import Judge
from steersman.judge.personas import END, as_talk, first_paragraph, play
from steersman.model import load_policy
from steersman.rollout import Engine, Sampling
from steersman.rollout.engine import end_ids
from steersman.run.device import resolve_device
from steersman.types import Prompt, SteersmanError

THANKS = "That is all."
"""What a scripted user answers to a question when everything is told."""


class PartnerConfig(Section):
    """Who plays the user: a model at `path`, one behind an endpoint, or, with neither, the row's own script."""

    path: str | None = Field(default=None, description="folder or hub name of a chat model")
    endpoint: EndpointConfig | None = Field(default=None, description="a chat model behind an endpoint")
    temperature: float = Field(default=0.7, gt=0, description="of a model at `path`; an endpoint has its own")
    max_new_tokens: int = Field(default=100, ge=1, description="longest message of a model at `path`, in tokens")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N, of a model at `path`")

    @model_validator(mode="after")
    def _one(self) -> PartnerConfig:
        if self.path is not None and self.endpoint is not None:
            raise ValueError("give path or endpoint, not both")
        return self


class Partner(Protocol):
    """Who answers the actor."""

    def reply(self, row: dict[str, Any], turns: Sequence[Message], seed: int) -> str:
        """The user's next message; END where the user leaves."""
        ...


class Dialogue:
    """The user opens, answers every reply, and leaves; then the outcome is the reward, in [0, 1].

    A scripted user tells one of its row's `facts` for each reply that asks something (has a question mark), and
    leaves at the first that asks nothing. One that a model plays leaves when the model says so. Both leave after
    `patience` replies. Without a `judge` the outcome is the share of the row's `values` that the last reply names; a
    judge grades the whole conversation by its rubric. Thoughts are not heard. Raises SteersmanError for sections that
    are none, and for a row that lacks a column.
    """

    def __init__(
        self, user: dict[str, Any] | None = None, judge: dict[str, Any] | None = None, patience: int = 6
    ) -> None:
        self.partner, self.patience = _partner(json.dumps(user or {}, sort_keys=True)), patience
        self.judge = None if judge is None else _judge(json.dumps(judge, sort_keys=True))

    def begin(self, row: dict[str, Any], seed: int = 0) -> str:
        self.row, self.seed, self.turns = row, seed, list[Message]()
        opening = row.get("opening") or self.partner.reply(row, [], seed)
        self._heard(str(opening))
        return str(opening)

    def step(self, text: str) -> tuple[str, float, bool]:
        text = without_thoughts(text).strip()
        self.turns.append({"role": "assistant", "content": text})
        said = self.partner.reply(self.row, self.turns, self.seed)
        if END in said or not said or len(self.turns) >= 2 * self.patience:
            return "", self._outcome(text), True
        self._heard(said)
        return said, 0.0, False

    def _heard(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def _outcome(self, last: str) -> float:
        if self.judge is None:
            values = _texts(self.row, "values")
            return sum(value.lower() in last.lower() for value in values) / max(len(values), 1)
        asked = f"A person talks with an assistant. What the person wants: {_person(self.row, 'goal')}"
        return self.judge(asked, as_talk(self.turns, {"user": "Person", "assistant": "Assistant"}))


class Script:
    """Tells the row's `facts` one by one, each when asked."""

    def reply(self, row: dict[str, Any], turns: Sequence[Message], seed: int) -> str:
        facts = _texts(row, "facts")
        told = sum(m["role"] == "user" for m in turns) - 1
        if turns and "?" not in turns[-1]["content"]:
            return END
        if not turns or told >= len(facts):
            return THANKS if turns else "Hello."
        return facts[told]


class ModelPartner:
    """A chat model on this machine; conversations take turns, since it can read but one batch at a time."""

    def __init__(self, config: PartnerConfig) -> None:
        assert config.path is not None
        policy = load_policy(config.path, device=resolve_device(config.device), trainable=False)
        tokenizer = policy.tokenizer
        self.layout = Layout(tokenizer, wrap_in_chat=True)
        ends = end_ids(policy.model, tokenizer, also=template_ends(tokenizer))
        self.engine = Engine(policy.model, tokenizer, eos_token_id=ends)
        self.sampling = Sampling(config.max_new_tokens, config.temperature)
        self.lock = threading.Lock()

    def reply(self, row: dict[str, Any], turns: Sequence[Message], seed: int) -> str:
        ids, text = self.layout.prompt(play(_person(row, "character"), _person(row, "goal"), turns))
        with self.lock:
            sample = self.engine.generate([Prompt(ids, text)], self.sampling, seed=(seed, len(turns)))[0]
        return first_paragraph(sample.text, cut=sample.finish == "length")


class EndpointPartner:
    """A chat model behind an endpoint: how it is sampled, and whether that repeats, is the endpoint's matter."""

    def __init__(self, config: EndpointConfig) -> None:
        self.endpoint = Endpoint(config, "environment.args.user")

    def reply(self, row: dict[str, Any], turns: Sequence[Message], seed: int) -> str:
        said: list[dict[str, Any]] = []
        asked = play(_person(row, "character"), _person(row, "goal"), turns)
        self.endpoint.ask([asked], lambda _, reply: said.append(reply), lambda: True)
        return first_paragraph(str(said[0]["text"]), cut=said[0]["cut"])


class Grades:
    """A judge's grades as shares of its scale, for one conversation at a time."""

    def __init__(self, config: JudgeConfig) -> None:
        self.judge, self.lock = Judge(config), threading.Lock()

    def __call__(self, asked: str, talk: str) -> float:
        low, high = self.judge.config.scale
        with self.lock:
            grade = self.judge.grade([(asked, talk)])[0]
        return 0.5 if grade is None else (grade - low) / (high - low)


@cache
def _partner(section: str) -> Partner:
    config = _read(PartnerConfig, section, "user")
    if config.path is not None:
        return ModelPartner(config)
    return Script() if config.endpoint is None else EndpointPartner(config.endpoint)


@cache
def _judge(section: str) -> Grades:
    config = _read(JudgeConfig, section, "judge")
    if config.reward:
        raise SteersmanError("environment.args.judge: rewards have no scale; name them in reward.parts")
    return Grades(config)


def _read(kind: Any, section: str, name: str) -> Any:
    try:
        return kind.model_validate(json.loads(section))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([name, *map(str, first["loc"])])
        raise SteersmanError(f"environment.args.{place}: {first['msg']}") from error


def _person(row: dict[str, Any], column: str) -> str:
    if not isinstance(row.get(column), str):
        raise SteersmanError(
            f"environment: a user that a model plays or that a judge grades needs the column {column!r}, a text"
        )
    return row[column]


def _texts(row: dict[str, Any], column: str) -> list[str]:
    found = row.get(column)
    if not isinstance(found, list) or not found or not all(isinstance(x, str) and x for x in found):
        raise SteersmanError(f"environment: the row has no column {column!r}, a list of texts")
    return found
