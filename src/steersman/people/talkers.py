"""Who takes part in a conversation: a model on this machine, or one behind an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.data import DataConfig, Query, Row
from steersman.data.examples import Message
from steersman.flywheel.players import Player
from steersman.judge import EndpointConfig
from steersman.judge.endpoint import Endpoint
from steersman.model import load_tokenizer
from steersman.recipe.sections import ModelConfig, RolloutConfig
from steersman.run.run_config import RunConfig

Turns = list[Message]


class Said(NamedTuple):
    """A message, and whether a limit ended it and not its speaker; empty where there is none."""

    text: str = ""
    cut: bool = False


class TalkerConfig(Section):
    """One speaker: exactly one of path and endpoint."""

    path: str | None = Field(default=None, description="folder or hub name of a chat model")
    endpoint: EndpointConfig | None = Field(default=None, description="a chat model behind an endpoint")
    temperature: float = Field(
        default=0.7, gt=0, description="sampling temperature of a model at `path`; an endpoint has its own"
    )
    max_new_tokens: int = Field(default=200, ge=1, description="longest message of a model at `path`, in tokens")

    @model_validator(mode="after")
    def _one(self) -> TalkerConfig:
        if (self.path is None) == (self.endpoint is None):
            raise ValueError("give exactly one of path and endpoint")
        return self


class Talker(Protocol):
    """Says the next thing in many conversations at once."""

    def reply(self, conversations: Sequence[Turns], seed: Sequence[int]) -> list[Said]:
        """The next message in each; empty where the conversation no longer fits into the model's context."""
        ...

    def release(self) -> None:
        """Gives its memory back; a later call takes it again."""
        ...


def open_talker(who: str, config: TalkerConfig, run: RunConfig, device: Any) -> Talker:
    """The speaker of the recipe's section `who`."""
    return RemoteTalker(who, config.endpoint) if config.endpoint is not None else LocalTalker(config, run, device)


class LocalTalker:
    """A chat model on this machine, loaded when it is first asked. Raises SteersmanError where there is none."""

    def __init__(self, config: TalkerConfig, run: RunConfig, device: Any) -> None:
        assert config.path is not None
        load_tokenizer(config.path)
        self.rollout = RolloutConfig(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
        self.player = Player(ModelConfig(path=config.path), run, device)
        self.data = DataConfig(path="conversations", on_too_long="drop")

    def reply(self, conversations: Sequence[Turns], seed: Sequence[int]) -> list[Said]:
        if not conversations:
            return []
        queries = [Query(turns, Row({"prompt": turns}, "conversations", i)) for i, turns in enumerate(conversations)]
        rows, _ = self.player.answer(queries, range(len(queries)), self.data, self.rollout, n=1, seed=seed)
        said = {row["index"]: Said(row["completion"].strip(), row["finish"] == "length") for row in rows}
        return [said.get(i, Said()) for i in range(len(conversations))]

    def release(self) -> None:
        self.player.release()


class RemoteTalker:
    """A chat model behind an endpoint; its sampling is the endpoint's section's."""

    def __init__(self, who: str, config: EndpointConfig) -> None:
        self.endpoint = Endpoint(config, who)

    def reply(self, conversations: Sequence[Turns], seed: Sequence[int]) -> list[Said]:
        said = [Said()] * len(conversations)

        def keep(index: int, reply: dict[str, Any]) -> None:
            said[index] = Said(str(reply["text"]).strip(), reply["cut"])

        self.endpoint.ask(conversations, keep, lambda: True)
        return said

    def release(self) -> None:
        """It has none here."""
