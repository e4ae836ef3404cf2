"""Environments as people write them: a class with tools, a class that answers text, or functions alone.

Two kinds of class are known by the methods that they define:

    class Shop:                                    # methods are tools
        def reset(self, **row) -> str | None       # what is added to the prompt
        def buy(self, item: str) -> str            # any public method: a tool, its docstring the schema
        def get_reward(self) -> float              # asked when the episode is over

    class Riddle:                                  # every reply is answered
        def begin(self, row) -> str | list[dict]   # what the model is shown first; may take `seed` too
        def step(self, text) -> (text, reward, done), or an object with these three

A class with tools ends its episode when a reply calls none, or, where it has an attribute `done`, when that is true.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from steersman.data.examples import Message
from steersman.environments.port import Answer, Call, Episode, PayingEnvironment, Reply
from steersman.environments.text import clean_text, reward_of
from steersman.environments.tools import Tool, as_text, tools_of
from steersman.guards.coroutines import await_result
from steersman.guards.functions import load_function
from steersman.guards.raised import place_of
from steersman.types import SteersmanError

OnError = Literal["tell", "end"]

_OWN = ("reset", "get_reward", "close")
"""Public methods of a class with tools that are no tools."""


class FaultError(Exception):
    """A call failed in a way that ends the episode."""


class ToolEnvironment(PayingEnvironment):
    """Functions as tools; `kind`, where given, is a class whose public methods are tools too.

    Raises SteersmanError for functions that are no tools, naming them.
    """

    def __init__(
        self,
        functions: Sequence[str] = (),
        kind: type | None = None,
        *,
        args: Mapping[str, Any] | None = None,
        on_error: OnError = "tell",
        longest: int = 4000,
        where: str = "",
    ) -> None:
        self.kind, self.args, self.on_error, self.longest = kind, dict(args or {}), on_error, longest
        self.functions = [(spec, load_function(spec)) for spec in functions]
        self.where = where or ", ".join(functions)
        self.tools_by_name = tools_of([*self.functions, *methods_of(kind, self.where)])
        if not self.tools_by_name:
            raise SteersmanError(f"environment {self.where}: it has no tool: no public method beside reset")

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self.tools_by_name.values()]

    @property
    def pays(self) -> bool:
        return self.kind is not None and "get_reward" in vars_of(self.kind)

    def findings(self) -> list[str]:
        return [finding for tool in self.tools_by_name.values() for finding in tool.findings]

    def describe(self) -> str:
        return f"{self.where}: tools {', '.join(self.tools_by_name)}"

    def open(self) -> Episode:
        own = None if self.kind is None else self.kind(**self.args)
        return ToolEpisode(self, own)


class ToolEpisode:
    """Makes the calls of each reply and shows their results, until a reply makes none."""

    def __init__(self, environment: ToolEnvironment, own: Any) -> None:
        self.environment, self.instance = environment, own

    def begin(self, messages: list[Message], row: dict[str, Any], seed: int) -> list[Message]:
        if self.instance is None or "reset" not in vars_of(type(self.instance)):
            return messages
        reset = self.instance.reset
        told = await_result(reset(**_accepted(reset, {**row, "seed": seed, "prompt": messages})))
        if told is None:
            return messages
        if not isinstance(told, str):
            raise FaultError(f"reset gave {type(told).__name__}; it gives the text to add to the prompt, or None")
        return _added(messages, clean_text(told, self.environment.longest))

    def step(self, reply: Reply) -> Answer:
        if not reply.calls:
            return Answer(reward=self._reward(), done=True)
        messages = [self._result(call) for call in reply.calls]
        done = bool(getattr(self.instance, "done", False))
        return Answer(messages, self._reward() if done else 0.0, done)

    def close(self) -> None:
        if self.instance is not None and "close" in vars_of(type(self.instance)):
            self.instance.close()

    def _reward(self) -> float:
        if not self.environment.pays:
            return 0.0
        try:
            return reward_of(await_result(self.instance.get_reward()), "get_reward")
        except ValueError as error:
            raise FaultError(str(error)) from error

    def _result(self, call: Call) -> Message:
        return {"role": "tool", "name": call.name, "content": self._called(call)}

    def _called(self, call: Call) -> str:
        """What the model is shown of a call: its result, or why there is none."""
        if call.problem:
            return f"error: {call.problem}"
        tool = self.environment.tools_by_name.get(call.name)
        if tool is None:
            known = ", ".join(self.environment.tools_by_name)
            return f"error: there is no tool {clean_text(call.name, 40)!r}; there are: {known}"
        try:
            arguments = tool.check(call)
        except ValueError as error:
            return f"error: {clean_text(str(error), 500)}"
        return self._run(tool, arguments)

    def _run(self, tool: Tool, arguments: dict[str, Any]) -> str:
        function = tool.function
        if self.instance is not None and function is vars_of(type(self.instance)).get(tool.name):
            function = functools.partial(function, self.instance)
        try:
            return clean_text(as_text(await_result(function(**arguments))), self.environment.longest)
        except (SystemExit, Exception) as error:
            if self.environment.on_error == "end":
                raise FaultError(
                    f"{tool.name} raised {type(error).__name__}: {clean_text(str(error), 200)}{place_of(error)}"
                ) from error
            return f"error: {type(error).__name__}: {clean_text(str(error), 500)}"


class TextEnvironment(PayingEnvironment):
    """A class that answers every reply with text."""

    def __init__(self, kind: type, *, args: Mapping[str, Any] | None = None, longest: int = 4000, where: str) -> None:
        self.kind, self.args, self.longest, self.where = kind, dict(args or {}), longest, where

    @property
    def actions(self) -> Sequence[str]:
        return tuple(vars_of(self.kind).get("actions", ()))

    def findings(self) -> list[str]:
        return [] if inspect.getdoc(self.kind) else [f"{self.kind.__name__}: no docstring"]

    def describe(self) -> str:
        return f"{self.where}: answers text"

    def open(self) -> Episode:
        return TextEpisode(self, self.kind(**self.args))


class TextEpisode:
    def __init__(self, environment: TextEnvironment, own: Any) -> None:
        self.environment, self.instance = environment, own

    def begin(self, messages: list[Message], row: dict[str, Any], seed: int) -> list[Message]:
        begin = self.instance.begin
        extra = {"seed": seed} if "seed" in inspect.signature(begin).parameters else {}
        told = await_result(begin({**row, "prompt": messages}, **extra))
        if told is None:
            return messages
        if isinstance(told, str):
            return _added(messages, clean_text(told, self.environment.longest))
        return [_message(turn, self.environment.longest) for turn in told]

    def step(self, reply: Reply) -> Answer:
        turn = await_result(self.instance.step(reply.text))
        if isinstance(turn, tuple):
            if len(turn) != 3:
                raise FaultError(f"step gave {len(turn)} values; it gives text, reward and done")
            text, reward, done = turn
            truncated = False
        else:
            try:
                text, reward, done = turn.text, turn.reward, turn.done
            except AttributeError as error:
                raise FaultError(
                    f"step gave {type(turn).__name__}; it gives (text, reward, done) or an object with these three"
                ) from error
            truncated = bool(getattr(turn, "truncated", False))
        try:
            reward = reward_of(reward, "step")
        except ValueError as error:
            raise FaultError(str(error)) from error
        return Answer(self._messages(text), reward, bool(done) and not truncated, truncated)

    def close(self) -> None:
        if "close" in vars_of(self.environment.kind):
            self.instance.close()

    def _messages(self, text: Any) -> list[Message]:
        if text is None or text == "":
            return []
        if isinstance(text, str):
            return [{"role": "user", "content": clean_text(text, self.environment.longest)}]
        if isinstance(text, list):
            return [_message(turn, self.environment.longest) for turn in text]
        raise FaultError(f"step said {type(text).__name__}; it says text, or a list of messages")


def environment_class(spec: str) -> type:
    """The class that "file.py:Class" or "module:Class" names. Raises SteersmanError if that is not a class."""
    kind: Any = load_function(spec)
    if not isinstance(kind, type):
        raise SteersmanError(f"environment '{spec}': it is no class; functions go into environment.tools")
    return kind


def from_class(
    spec: str, args: Mapping[str, Any], on_error: OnError, longest: int
) -> ToolEnvironment | TextEnvironment:
    """The environment that a class is, by the methods that it defines.

    Raises SteersmanError for a class that is neither kind, or for settings that its constructor does not take.
    """
    kind = environment_class(spec)
    try:
        inspect.signature(kind).bind(**args)
    except TypeError as error:
        raise SteersmanError(f"environment '{spec}': environment.args do not fit its constructor: {error}") from error
    has = vars_of(kind)
    if "begin" in has and "step" in has:
        return TextEnvironment(kind, args=args, longest=longest, where=spec)
    if "begin" in has or ("step" in has and "reset" not in has):
        missing = "step" if "begin" in has else "begin"
        raise SteersmanError(
            f"environment '{spec}': a class that answers text has begin and step; it lacks {missing}"
        )
    return ToolEnvironment(kind=kind, args=args, on_error=on_error, longest=longest, where=spec)


def methods_of(kind: type | None, where: str) -> list[tuple[str, Callable[..., Any]]]:
    """The public methods of a class with tools, as functions without `self`."""
    if kind is None:
        return []
    found = []
    for name, method in vars_of(kind).items():
        if not name.startswith("_") and name not in _OWN and inspect.isfunction(method):
            found.append((f"{where}, method {name}", method))
    return found


def vars_of(kind: type) -> dict[str, Any]:
    """What a class and its bases define, the class's own last; of `object` nothing."""
    out: dict[str, Any] = {}
    for base in reversed(kind.__mro__[:-1]):
        out |= vars(base)
    return out


def _added(messages: list[Message], text: str) -> list[Message]:
    """The turns with the text at the end of the last one, or as a turn where there is none."""
    if not messages:
        return [{"role": "user", "content": text}]
    last = messages[-1]
    made: Message = {**last, "content": last["content"] + text}
    return [*messages[:-1], made]


def _message(turn: Any, longest: int) -> Message:
    if (
        not isinstance(turn, dict)
        or not isinstance(turn.get("content"), str)
        or not isinstance(turn.get("role"), str)
    ):
        raise FaultError("a message is a dict with the texts `role` and `content`")
    if turn["role"] not in ("system", "user", "assistant", "tool"):
        raise FaultError(
            f"there is no role {clean_text(turn['role'], 40)!r}; there are system, user, assistant and tool"
        )
    return {"role": turn["role"], "content": clean_text(turn["content"], longest)}


def _accepted(function: Callable[..., Any], columns: dict[str, Any]) -> dict[str, Any]:
    """The columns that a function has parameters for, all where it takes `**`.

    Raises SteersmanError for a column that it needs and the row lacks.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return columns
    for p in parameters:
        if p.name not in columns and p.default is p.empty:
            have = ", ".join(columns) or "none"
            raise SteersmanError(
                f"environment: reset needs the column {p.name!r}, which the data lack; there are: {have}"
            )
    return {p.name: columns[p.name] for p in parameters if p.name in columns}
