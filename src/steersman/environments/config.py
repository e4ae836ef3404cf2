"""The recipe's `environment` section, and the environment that it describes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.environments.agent import AgentEnvironment
from steersman.environments.classes import ToolEnvironment, from_class
from steersman.environments.port import Environment
from steersman.environments.processes import ProcessEnvironment
from steersman.environments.records import RecordedEnvironment
from steersman.extras import explain_missing

DiscountPer = Literal["token", "turn"]
BaselinePer = Literal["episode", "turn"]
_KINDS = ("tools", "path", "gym", "agent")


class EnvironmentConfig(Section):
    """What the model plays in: exactly one of tools, path, gym and agent."""

    tools: list[str] = Field(
        default_factory=list,
        description="Python functions with type hints that the model may call, such as my_tools.py:add",
    )
    path: str | None = Field(
        default=None, description="my_env.py:Env, a class with tools (reset, get_reward) or with begin and step"
    )
    agent: list[str] = Field(
        default_factory=list,
        description="a program and its arguments, run once per episode; it asks the OpenAI endpoint that it finds in "
        "OPENAI_BASE_URL and OPENAI_API_KEY, and reads the row as JSON from its standard input",
    )
    agent_pays: bool = Field(
        default=False,
        description='agent: the last line of its output is {"reward": NUMBER}, the reward of the episode',
    )
    gym: str | None = Field(default=None, description="name of a Gymnasium environment, such as FrozenLake-v1")
    args: dict[str, Any] = Field(default_factory=dict, description="settings of the class, or of gymnasium.make")
    actions: list[str] = Field(default_factory=list, description="gym: words for the actions 0, 1, ...")
    rendering: str | None = Field(default=None, description="gym: function of (env, observation, info) to text")
    invalid_reward: float = Field(default=0.0, description="gym: reward of a reply that names no action")
    max_turns: int = Field(default=8, ge=1, description="replies of the model per episode; then it is truncated")
    max_tokens: int | None = Field(
        default=None, ge=2, description="tokens of a whole episode, its prompt included; null: the model's context"
    )
    time_limit: float = Field(default=30.0, gt=0, description="seconds that one call of the environment may take")
    episode_limit: float | None = Field(
        default=None, gt=0, description="seconds that an episode may wait for its environment in all; null: no limit"
    )
    workers: int = Field(default=64, ge=1, description="threads that run environments side by side")
    run_in: Literal["threads", "processes"] = Field(
        default="threads",
        description="threads: environments run inside steersman's process; processes: every episode under way has "
        "a process of its own, so that a tool that crashes, hangs or blocks the interpreter harms no other (also "
        "faster for tools that compute in Python)",
    )
    record: str | None = Field(
        default=None, description="file in which everything that an environment says is recorded"
    )
    replay: bool = Field(
        default=False, description="episodes are played from `record` and no environment is asked anything"
    )
    overlap: bool = Field(
        default=False,
        description="let an episode's next turn join the batch under way as soon as a row is free, while other "
        "episodes wait for their tools; faster with slow tools. Bit-for-bit repeatable with rollout.engine inside "
        "only: with servers the batches depend on timing",
    )
    overlap_steps: int = Field(
        default=0,
        ge=0,
        description="with overlap and rollout.engine inside: decoding steps (a token of every row) before an "
        "episode may speak again. Choose as many as the slowest tools take, so that decoding does not wait for "
        "them",
    )
    retries: int = Field(default=0, ge=0, description="how often an episode that could not begin is begun again")
    on_error: Literal["tell", "end"] = Field(
        default="tell", description="when a tool raises. tell: the model is shown the error; end: the episode ends"
    )
    on_fault: Literal["end", "truncate", "stop"] = Field(
        default="end",
        description="when an environment hangs, raises or returns nonsense. end: the episode ends with "
        "fault_reward; truncate: it is truncated and keeps the rewards that it has; stop: the run stops",
    )
    fault_reward: float = Field(default=0.0, description="reward of the turn at which an environment failed")
    max_characters: int = Field(
        default=4000, ge=1, description="longest message of the environment, in characters; the rest is cut off"
    )
    history: Literal["refuse", "keep", "segments"] = Field(
        default="refuse",
        description="what to do when the chat template rewrites earlier turns (for example drops their thoughts). "
        "refuse: stop before training; keep: show the model its turns as it wrote them; segments: show what the "
        "template shows, and train each turn on the history that it was given",
    )
    tell_tools: bool = Field(
        default=False, description="describe the tools in the prompt's text, for chat templates that show none"
    )
    discount_per: DiscountPer = Field(
        default="token", description="what algorithm.gamma counts by: every token, or once a turn"
    )
    baseline_per: BaselinePer = Field(
        default="episode",
        description="what methods that compare the samples of a prompt compare. episode: the rewards of whole "
        "episodes; turn: the rewards from the same turn on",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> EnvironmentConfig:
        given = [kind for kind in _KINDS if getattr(self, kind)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}; {' and '.join(given) or 'none'} given")
        if self.gym is None and (self.actions or self.rendering or self.invalid_reward):
            raise ValueError("actions, rendering and invalid_reward belong to gym")
        if self.agent_pays and not self.agent:
            raise ValueError("agent_pays belongs to agent")
        if self.overlap_steps and not self.overlap:
            raise ValueError("overlap_steps belongs to overlap")
        if self.replay and self.record is None:
            raise ValueError("replay plays episodes from a record; give its file as `record`")
        if self.agent and (self.run_in == "processes" or self.record):
            raise ValueError(
                "run_in and record belong to other environments; an agent is a program of its own already"
            )
        if (self.tools or self.agent) and self.args:
            raise ValueError("args belong to path or gym")
        return self


def open_environment(config: EnvironmentConfig) -> Environment:
    """The environment that the section describes. Raises SteersmanError for what does not load or fit."""
    environment = _inner(config)
    if config.run_in == "processes" and not config.replay:
        section = config.model_copy(update={"run_in": "threads", "record": None}).model_dump_json()
        environment = ProcessEnvironment(environment, section, config.time_limit)
    if config.record is not None:
        environment = RecordedEnvironment(environment, config.record, replay=config.replay)
    return environment


def _inner(config: EnvironmentConfig) -> Environment:
    """The environment in this process."""
    if config.tools:
        return ToolEnvironment(config.tools, on_error=config.on_error, longest=config.max_characters)
    if config.gym is not None:
        with explain_missing("environment.gym"):
            from steersman.environments.gym import GymEnvironment
        return GymEnvironment(
            config.gym, args=config.args, actions=config.actions, rendering=config.rendering,
            invalid_reward=config.invalid_reward, longest=config.max_characters,
        )  # fmt: skip
    if config.agent:
        return AgentEnvironment(
            config.agent, pays=config.agent_pays, time_limit=config.time_limit, longest=config.max_characters
        )
    assert config.path is not None
    return from_class(config.path, config.args, config.on_error, config.max_characters)
