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

    tools: list[str] = Field(default_factory=list, description="typed functions, as my_tools.py:add")
    path: str | None = Field(
        default=None, description="my_env.py:Env, a class with tools (reset, get_reward) or with begin and step"
    )
    agent: list[str] = Field(
        default_factory=list,
        description="a program and its arguments, run once per episode; it asks the OpenAI endpoint that it finds in "
        "OPENAI_BASE_URL and OPENAI_API_KEY, and reads the row as JSON from its standard input",
    )
    agent_pays: bool = Field(
        default=False, description='agent: its last line of output is {"reward": NUMBER}, what the episode earns'
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
        description="processes: every episode under way has one of its own, so that a tool that crashes, hangs or "
        "holds the interpreter takes nothing else along; for tools that compute in Python it is faster too",
    )
    record: str | None = Field(default=None, description="file that everything an environment says is recorded in")
    replay: bool = Field(
        default=False, description="episodes are played from `record` and no environment is asked anything"
    )
    overlap: bool = Field(
        default=False,
        description="turns join the batch that is being decoded, half of the episodes at a time, while the others "
        "wait for their tools; faster with slow tools. Repeatable bit for bit with the engine inside; with servers, "
        "what is sampled together depends on time",
    )
    overlap_steps: int = Field(
        default=0,
        ge=0,
        description="overlap with the engine inside: steps of decoding (a token of every row) before an episode may "
        "speak again; about what tools take at most, so that nobody is waited for while rows stand idle",
    )
    retries: int = Field(default=0, ge=0, description="how often a beginning that failed is tried anew")
    on_error: Literal["tell", "end"] = Field(
        default="tell", description="a tool that raises: its error is shown to the model, or ends the episode"
    )
    on_fault: Literal["end", "truncate", "stop"] = Field(
        default="end",
        description="an environment that hangs, raises or gives nonsense: the episode ends with fault_reward, is "
        "truncated with what it has, or the run stops",
    )
    fault_reward: float = Field(default=0.0, description="reward of the turn at which an environment failed")
    max_characters: int = Field(default=4000, ge=1, description="of one message of the environment; the rest is cut")
    history: Literal["refuse", "keep", "segments"] = Field(
        default="refuse",
        description="a chat template that shows earlier turns otherwise than they were said (without thoughts, say): "
        "refused; or the model sees its turns as it said them; or it sees what the template shows, and every turn "
        "whose history was shown anew is a segment that is trained behind that",
    )
    tell_tools: bool = Field(
        default=False, description="tell the tools in the prompt, where the chat template shows none"
    )
    discount_per: DiscountPer = Field(
        default="token", description="what algorithm.gamma counts by: every token, or once a turn"
    )
    baseline_per: BaselinePer = Field(
        default="episode",
        description="what methods that compare the samples of a prompt compare: whole episodes, or what they earn "
        "from the same turn on",
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
