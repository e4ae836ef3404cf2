"""Gymnasium environments played in text: what is seen is rendered, and a reply names an action.

Text observations are shown as they are. Others are shown by the environment's own drawing in characters where it has
one (FrozenLake, Taxi, CliffWalking), else as the observation's numbers; a function of one's own may do it better.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
from gymnasium import spaces

from steersman.data.examples import Message
from steersman.environments.port import Answer, Episode, PayingEnvironment, Reply
from steersman.environments.text import clean_text, reward_of
from steersman.guards.functions import load_function
from steersman.types import SteersmanError

_HERE = re.compile(r"\x1b\[4[1-7]m(.)\x1b\[0m")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class GymEnvironment(PayingEnvironment):
    """An environment of `gymnasium.make(name, **args)` with named actions.

    `actions` are the words for the actions 0, 1, ...; without them the numbers are. `rendering` is
    `f(env, observation, info) -> str`. A reply that names no action is told so, at `invalid_reward`, and the world
    stands still. Raises SteersmanError for an unknown name, or for actions that can't be listed.
    """

    def __init__(
        self, name: str, *, args: Mapping[str, Any] | None = None, actions: Sequence[str] = (),
        rendering: str | None = None, invalid_reward: float = 0.0, longest: int = 4000,
    ) -> None:  # fmt: skip
        self.name, self.args, self.invalid_reward, self.longest = name, dict(args or {}), invalid_reward, longest
        self.rendering = None if rendering is None else load_function(rendering)
        world = self._make()
        if not isinstance(world.action_space, spaces.Text | spaces.Discrete):
            raise SteersmanError(
                f"environment.gym: {name} takes actions of kind {type(world.action_space).__name__}; a reply can "
                "name discrete actions, or be a text"
            )
        count = int(world.action_space.n) if isinstance(world.action_space, spaces.Discrete) else 0
        self.offset = int(world.action_space.start) if isinstance(world.action_space, spaces.Discrete) else 0
        if actions and len(actions) != count:
            raise SteersmanError(f"environment.actions: {len(actions)} words for the {count} actions of {name}")
        self._actions = tuple(actions) or tuple(str(i + self.offset) for i in range(count))
        world.close()

    @property
    def actions(self) -> Sequence[str]:
        return self._actions

    def describe(self) -> str:
        return f"Gymnasium {self.name}, actions {', '.join(self._actions) or 'any text'}"

    def open(self) -> Episode:
        return GymEpisode(self, self._make())

    def action_of(self, reply: str) -> int | str | None:
        """The action that a reply names last; None where it names none. Text actions are the reply itself."""
        if not self._actions:
            return reply
        numbers = sorted(range(len(self._actions)), key=lambda i: len(self._actions[i]), reverse=True)
        words = "|".join(f"({re.escape(self._actions[i])})" for i in numbers)  # a group each tells which one was read
        found = [match.groups() for match in re.finditer(rf"(?<!\w)(?:{words})(?!\w)", reply, re.IGNORECASE)]
        if not found:
            return None
        return self.offset + next(i for i, read in zip(numbers, found[-1], strict=True) if read is not None)

    def _make(self) -> gym.Env:
        try:
            spec = gym.spec(self.name)
            try:
                return gym.make(self.name, render_mode="ansi", **self.args)
            except (TypeError, gym.error.Error, AssertionError):
                return gym.make(spec, **self.args)
        except (gym.error.Error, TypeError) as error:
            raise SteersmanError(f"environment.gym: {self.name} can't be made: {error}") from error


class GymEpisode:
    def __init__(self, environment: GymEnvironment, world: gym.Env) -> None:
        self.environment, self.world = environment, world

    def begin(self, messages: list[Message], row: dict[str, Any], seed: int) -> list[Message]:
        observation, info = self.world.reset(seed=seed % 2**31)
        text = self._shown(observation, info)
        if not messages:
            return [{"role": "user", "content": text}]
        made: Message = {**messages[-1], "content": messages[-1]["content"] + text}
        return [*messages[:-1], made]

    def step(self, reply: Reply) -> Answer:
        environment = self.environment
        action = environment.action_of(reply.content)
        if action is None:
            told = f"say one of: {', '.join(environment.actions)}\n"
            return Answer([{"role": "user", "content": told}], environment.invalid_reward)
        observation, reward, terminated, truncated, info = self.world.step(action)
        text = self._shown(observation, info)
        paid = reward_of(reward, environment.name)
        return Answer([{"role": "user", "content": text}], paid, bool(terminated), bool(truncated) and not terminated)

    def close(self) -> None:
        self.world.close()

    def _shown(self, observation: Any, info: dict[str, Any]) -> str:
        environment = self.environment
        if environment.rendering is not None:
            text = environment.rendering(self.world, observation, info)
        elif isinstance(observation, str):
            text = observation
        elif self.world.render_mode == "ansi":
            text = _COLOUR.sub("", _HERE.sub(r"[\1]", str(self.world.render())))
        else:
            text = f"observation: {observation}\n"
        return clean_text(str(text), environment.longest)
