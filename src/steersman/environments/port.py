"""What an episode is to the loop, whatever interface its author wrote it against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from steersman.data.examples import Message


@dataclass(slots=True, frozen=True)
class Call:
    """A tool call that a reply makes; `problem` says why it can't be made, as the model is to be told."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(slots=True, frozen=True)
class Reply:
    """What the policy said in one turn: its text, the text without thoughts and calls, and the calls.

    `cut` says that the limit of the turn's tokens ended it.
    """

    text: str
    content: str
    calls: tuple[Call, ...] = ()
    cut: bool = False


@dataclass(slots=True, frozen=True)
class Answer:
    """What an environment does with a reply: what it says, what it pays, and whether the episode is over.

    `truncated` says that it would have gone on: a limit ended it. `new_conversation` says that the messages do not go
    on from what was said before, and begin another one.
    """

    messages: Sequence[Message] = ()
    reward: float = 0.0
    done: bool = False
    truncated: bool = False
    new_conversation: bool = False


class Episode(Protocol):
    """One episode, from its first message on; used by one thread at a time."""

    def begin(self, messages: list[Message], row: dict[str, Any], seed: int) -> list[Message]:
        """What the model is shown first. `messages` are the row's prompt as turns, `row` its other columns. The same
        seed gives the same episode for the same replies, where the environment can."""
        ...

    def step(self, reply: Reply) -> Answer: ...

    def close(self) -> None: ...


class Environment(Protocol):
    """Makes episodes.

    `tools` are the schemas that the model is shown; `pays` says that episodes have rewards of their own. `actions`
    are all that may be said, where they can be listed, for the players that try an environment out.
    """

    @property
    def tools(self) -> list[dict[str, Any]]: ...

    @property
    def pays(self) -> bool: ...

    @property
    def actions(self) -> Sequence[str]: ...

    def open(self) -> Episode: ...

    def findings(self) -> list[str]:
        """What its author may want to mend, such as a tool without a docstring."""
        ...

    def describe(self) -> str: ...


class PayingEnvironment:
    """What most environments are: they pay, show no tools, list no actions and have nothing to mend."""

    @property
    def tools(self) -> list[dict[str, Any]]:
        return []

    @property
    def pays(self) -> bool:
        return True

    @property
    def actions(self) -> Sequence[str]:
        return ()

    def findings(self) -> list[str]:
        return []


class EnvironmentAround:
    """What an environment that stands around another one shows: what the inner one does."""

    def __init__(self, inner: Environment) -> None:
        self.inner = inner

    @property
    def tools(self) -> list[dict[str, Any]]:
        return self.inner.tools

    @property
    def pays(self) -> bool:
        return self.inner.pays

    @property
    def actions(self) -> Sequence[str]:
        return self.inner.actions

    def findings(self) -> list[str]:
        return self.inner.findings()
