"""A model that writes: a text in, a text out; behind an endpoint, or local. Replies are kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.judge.cache import Reply, ReplyCache, key_of
from steersman.judge.config import EndpointConfig, LocalConfig
from steersman.judge.endpoint import Endpoint
from steersman.judge.judge import InterruptedJudgeError
from steersman.judge.local import Local
from steersman.types import Stats


class WriterConfig(Section):
    """Who writes: exactly one of endpoint and local."""

    endpoint: EndpointConfig | None = Field(default=None, description="a model behind an OpenAI-compatible endpoint")
    local: LocalConfig | None = Field(default=None, description="a model on this machine")
    max_calls: int | None = Field(
        default=None,
        ge=1,
        description="budget: largest number of replies, counting those that the cache already holds",
    )

    @model_validator(mode="after")
    def _one(self) -> WriterConfig:
        if (self.endpoint is None) == (self.local is None):
            raise ValueError("give exactly one of endpoint and local")
        return self


class Writer:
    """Writes replies to texts; equal texts are asked once, and what a cache in `folder` has is not asked again.

    `stopping` is asked between questions. Once `max_calls` replies are there, further texts get None. So does a text
    whose reply a limit cut, since such an end is none to be learned.
    """

    def __init__(self, config: WriterConfig, folder: Path, *, stopping: Callable[[], bool] = lambda: False) -> None:
        self.config, self.stopping = config, stopping
        self.endpoint = Endpoint(config.endpoint, "writer") if config.endpoint is not None else None
        self.local = Local(config.local) if config.local is not None else None
        self.cache = ReplyCache(folder / "replies.jsonl")

    def write(self, texts: Sequence[str], *, cut: bool = False) -> list[str | None]:
        """What the model writes to each text; None where the budget was spent, or a limit cut the reply, unless `cut`
        asks for these as well.

        Raises SteersmanError where the model fails for good; what was written is kept.
        """
        keys = {text: key_of(self._about(), text) for text in texts}
        new = [text for text in keys if keys[text] not in self.cache]

        def keep(index: int, reply: Reply) -> None:
            self.cache.add(keys[new[index]], reply, {"asked": new[index]})

        if new:
            ask = self.endpoint.ask if self.endpoint is not None else self._local.write
            ask(new, keep, self._may_ask)
        if self.stopping():
            raise InterruptedJudgeError("stopped while a model was writing; what was written is kept")
        replies = [self.cache.replies.get(keys[text]) for text in texts]
        return [None if r is None or (r.get("cut") and not cut) else str(r["text"]) for r in replies]

    def stats(self) -> Stats:
        """How many replies there are, and how many of them a limit cut; the same for a resumed run."""
        return {"writer/replies": len(self.cache.replies), "writer/cut": self._cut()}

    def warning(self) -> str:
        """What to do about replies that were cut; empty where none was."""
        if not self._cut():
            return ""
        return (
            f"{self._cut():,} of {len(self.cache.replies):,} replies of {self.describe()} were cut by its limit of "
            f"{self._limit():,} tokens, and none of these is taught; raise its max_tokens"
        )

    def describe(self) -> str:
        """One line: which model, where."""
        if self.config.endpoint is not None:
            return f"{self.config.endpoint.model} at {self.config.endpoint.url}"
        assert self.config.local is not None
        return f"model {self.config.local.path}"

    def _cut(self) -> int:
        return sum(bool(reply.get("cut")) for reply in self.cache.replies.values())

    def _limit(self) -> int:
        config = self.config.endpoint or self.config.local
        assert config is not None
        return config.max_tokens

    @property
    def _local(self) -> Local:
        assert self.local is not None
        return self.local

    def _may_ask(self) -> bool:
        spent = self.config.max_calls is not None and len(self.cache.replies) >= self.config.max_calls
        return not spent and not self.stopping()

    def _about(self) -> dict[str, Any]:
        how = {"timeout", "retries", "max_wait", "concurrency", "key_env", "url"}
        return self.config.model_dump(
            mode="json", exclude={"endpoint": how, "local": {"batch", "device"}, "max_calls": True}
        )
