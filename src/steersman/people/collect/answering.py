"""Who answers in chats: a model in this process, or one behind an OpenAI-compatible address."""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import httpx2
from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.data import DataConfig, layout
from steersman.data.template import UNTAUGHT_STOP
from steersman.guards.reply import read_body, without_key
from steersman.guards.untrusted import without_half_pairs
from steersman.model import context_length
from steersman.people.store.conversations import TurnText
from steersman.recipe.sections import ModelConfig, RolloutConfig
from steersman.rollout.live import Live
from steersman.run.device import resolve_device
from steersman.run.files.inputs import fingerprints
from steersman.run.run_config import RunConfig
from steersman.setup.generators import open_engine
from steersman.setup.models import policy_from
from steersman.types import Prompt, SteersmanError

Messages = list[dict[str, str]]
ROWS, QUEUE = 8, 256
"""Answers of one model that are decoded side by side, and those that may wait."""
LONGEST_CHAT = 4096
"""Most tokens of a conversation that a model is asked to go on with."""
LONGEST_WAIT = 300.0
"""Seconds after which nobody waits for an answer any more."""
LARGEST_REPLY = 8 << 20
"""Bytes of a reply of an address; what is longer is no answer."""


class AnsweringModel(Section):
    """A model that answers in chats: exactly one of path and url."""

    path: str | None = Field(default=None, description="folder or hub name of a model that runs in this process")
    url: str | None = Field(default=None, description="OpenAI-compatible address up to the version (.../v1)")
    name: str = Field(
        default="", description="its name in the store, and at its address; of a path by default the last part"
    )
    key_env: str = Field(default="OPENAI_API_KEY", description="environment variable with the address's key")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _one(self) -> AnsweringModel:
        if (self.path is None) == (self.url is None):
            raise ValueError("give exactly one of path and url")
        if self.url is not None and not self.name:
            raise ValueError("an address needs the model's name, as it is known there")
        return self

    @property
    def stored_name(self) -> str:
        """What the model is called in the store: `name`, or the last part of its path."""
        return self.name or str(self.path).rstrip("/").rsplit("/", 1)[-1]


class AnsweringSampling(Section):
    """How answers are drawn."""

    max_new_tokens: int = Field(default=256, ge=1, description="longest answer, in tokens")
    temperature: float = Field(default=0.7, gt=0, description="logits are divided by it")
    top_p: float = Field(default=0.95, gt=0, le=1, description="sample from the smallest set of this mass; 1 is off")


class Answerer(Protocol):
    """What gives the next turn of a user's conversation; asked by several threads at once."""

    def answer(self, messages: Messages, user: str) -> TurnText: ...


def open_answerer(model: AnsweringModel, sampling: AnsweringSampling) -> Answerer:
    """The model of a recipe, loaded."""
    return LocalModel(model, sampling) if model.path is not None else RemoteModel(model, sampling)


class LocalModel:
    """A model of this process: answers that are asked for at once are decoded together."""

    def __init__(self, model: AnsweringModel, sampling: AnsweringSampling) -> None:
        path = str(model.path)
        config = ModelConfig(path=path)
        self.policy = policy_from(config, RunConfig(), resolve_device(model.device), trainable=False)
        self.layout = layout(self.policy, DataConfig(path="chat"))
        stop = [] if self.layout.template.own else [UNTAUGHT_STOP]
        rollout = RolloutConfig(**sampling.model_dump(), stop=stop, held_out=0)
        engine, self.sampling = open_engine(rollout, self.policy), rollout.sampling()
        longest = min(context_length(self.policy.model) or LONGEST_CHAT, LONGEST_CHAT)
        self.live = Live(engine, rows=ROWS, longest=longest, new_tokens=sampling.max_new_tokens, queue=QUEUE)
        digests = fingerprints(config, Path("/nowhere"))
        version = next((d[:12] for paths in digests.values() for d in paths.values()), "")
        self.model = (model.stored_name, version)
        self.settings = sampling.model_dump()

    def answer(self, messages: Messages, user: str) -> TurnText:
        """The next turn. Raises SteersmanError where the conversation does not fit the model's context."""
        seed, begun = secrets.randbits(31), time.monotonic()
        turns: list[Any] = [dict(m) for m in messages]
        ids, _ = self.layout.prompt(turns)
        fitting = min(self.sampling.max_new_tokens, self.live.room(len(ids)))
        moved = Event()
        ticket = self.live.submit(
            Prompt(ids, ""), replace(self.sampling, max_new_tokens=fitting), moved.set, seed=seed
        )
        while not ticket.done:
            if not moved.wait(max(0.0, begun + LONGEST_WAIT - time.monotonic())):
                self.live.cancel(ticket)
                raise SteersmanError(f"no answer within {LONGEST_WAIT:g} seconds; ask again")
            moved.clear()
        if ticket.failure is not None:
            raise ticket.failure
        sample = ticket.samples[0]
        settings = self.settings | {"seed": seed}
        return TurnText(sample.text.strip(), self.model, settings, sample.finish, time.monotonic() - begun)


class RemoteModel:
    """A model behind an OpenAI-compatible address.

    It is told a rater's pseudonym, by which `steersman serve` keeps them with one model of an A/B test; an answer
    bears the name that the address gives it.
    """

    def __init__(self, model: AnsweringModel, sampling: AnsweringSampling) -> None:
        self.url = str(model.url).rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.name, self.settings = model.name, sampling.model_dump()
        self.key = os.environ.get(model.key_env, "").strip()
        # Unpacking would make a small reply a large one.
        self.headers = {"accept-encoding": "identity"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})

    def answer(self, messages: Messages, user: str) -> TurnText:
        """The next turn, as a store can keep it. Raises SteersmanError where no answer comes; the key is in
        neither."""
        body: dict[str, Any] = {
            "model": self.name, "messages": messages, "max_tokens": self.settings["max_new_tokens"],
            "temperature": self.settings["temperature"], "top_p": self.settings["top_p"], "user": user,
        }  # fmt: skip
        begun = time.monotonic()
        try:
            told = json.loads(self._exchange(body, begun + LONGEST_WAIT))
            choice, name = told["choices"][0], self._kept(str(told.get("model") or self.name))
            text = self._kept(choice["message"]["content"] or "")
            finish = self._kept(str(choice.get("finish_reason")))
        except httpx2.HTTPStatusError as error:
            raise SteersmanError(f"the model's address answers with status {error.response.status_code}") from None
        except (httpx2.HTTPError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise SteersmanError(f"the model's address gives no chat completion ({type(error).__name__})") from None
        return TurnText(text.strip(), (name, ""), self.settings, finish[:20], time.monotonic() - begun)

    def _exchange(self, body: dict[str, Any], until: float) -> bytes:
        """The body of the reply. Raises httpx2.HTTPError, and ValueError for one that is too long."""
        with httpx2.stream("POST", self.url, json=body, headers=self.headers, timeout=120.0) as reply:
            raw = read_body(reply.raise_for_status(), LARGEST_REPLY, until)
        if len(raw) > LARGEST_REPLY:
            raise ValueError("the reply is too long")
        return raw

    def _kept(self, text: str) -> str:
        """The text without a key that it echoes, and with U+FFFD for half surrogate pairs, which no store takes."""
        return without_key(without_half_pairs(text), self.key)
