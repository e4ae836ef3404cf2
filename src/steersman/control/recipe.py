"""The recipe of `steersman control`: the same sections for every method, with defaults that suit each one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, create_model, model_validator

from steersman.algorithms import ALGORITHMS
from steersman.algorithms.base import Algorithm
from steersman.algorithms.load import load_algorithm
from steersman.config.overrides import apply_overrides
from steersman.config.recipe_text import load_yaml
from steersman.config.sections import Section
from steersman.control.policies import NetworkConfig
from steersman.run.run_config import RunConfig
from steersman.tabular.learning import Method
from steersman.types import SteersmanError
from steersman.update.optimizer import OptimizerConfig

TABULAR: tuple[Method, ...] = ("q-learning", "sarsa", "expected-sarsa", "double-q")


class RolloutConfig(Section):
    """What is collected in each iteration."""

    copies: int = Field(default=8, ge=1, description="environments side by side")
    steps: int = Field(default=128, ge=1, description="steps of every copy per iteration, across ends of episodes")
    episodes: int | None = Field(
        default=None, ge=1, description="collect this many whole episodes instead; methods without a critic need it"
    )
    normalise: bool = Field(default=False, description="observations to mean 0, variance 1 by running statistics")
    reward_scale: float = Field(default=1.0, gt=0, description="rewards are multiplied by it, in learning only")


class CriticConfig(Section):
    """How the critic is trained; methods without a critic refuse this section."""

    value_clip: float | None = Field(
        default=None, gt=0, description="how far a value may move from its old one; null is off"
    )
    optimizer: OptimizerConfig = OptimizerConfig()


class EvaluationConfig(Section):
    """How the policy is judged, on episodes of its own."""

    episodes: int = Field(default=100, ge=1, description="episodes at the end of the run")
    during: int = Field(default=10, ge=1, description="episodes every run.eval_every iterations")
    greedy: bool = Field(default=True, description="the likeliest action; false samples as in training")


class DQNSettings(Section):
    """Deep Q-learning with a replay buffer and a target network."""

    title: ClassVar[str] = "DQN"
    paper: ClassVar[str] = "Mnih et al. 2015"
    gamma: float = Field(default=0.99, ge=0, le=1, description="discount per step")
    double: bool = Field(
        default=True, description="double DQN: the learning network chooses, the target network judges"
    )
    replay: int = Field(default=100_000, ge=1, description="transitions kept")
    batch: int = Field(default=128, ge=1, description="transitions per update")
    updates: int = Field(default=128, ge=1, description="updates per iteration")
    learning_starts: int = Field(default=1000, ge=1, description="steps before the first update")
    target_every: int = Field(default=250, ge=1, description="updates between refreshes of the target network")
    epsilon_start: float = Field(default=1.0, ge=0, le=1, description="share of random actions at the start")
    epsilon_end: float = Field(default=0.04, ge=0, le=1, description="share of random actions after the decay")
    epsilon_share: float = Field(default=0.2, gt=0, le=1, description="share of the run over which epsilon falls")


class TabularSettings(Section):
    """Tables of action values; see steersman.tabular.learning."""

    gamma: float = Field(default=0.99, ge=0, le=1, description="discount per step")
    episodes: int = Field(
        default=5000, ge=1, description="episodes of experience; of fewer than `iterations` each is a row of the log"
    )
    alpha: float = Field(default=0.5, gt=0, le=1, description="first step size of every entry")
    alpha_scale: float = Field(
        default=100.0, gt=0, description="updates of an entry after which its step size has halved"
    )
    epsilon_start: float = Field(default=1.0, ge=0, le=1, description="share of random actions at the start")
    epsilon_end: float = Field(default=0.05, ge=0, le=1, description="share of random actions at the end")
    initial: float = Field(default=0.0, description="what every action is believed to be worth at first")


class ControlRecipe(Section):
    """Reinforcement learning on a Gymnasium environment."""

    env: str = Field(default="CartPole-v1", description="name of a Gymnasium environment, or my_env.py:Class")
    env_options: dict[str, Any] = Field(default_factory=dict, description="arguments of the environment")
    algorithm: str = Field(default="ppo", description="name of the method")
    settings: Any = None
    rollout: RolloutConfig = RolloutConfig()
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig | None = None
    iterations: int = Field(default=100, ge=1, description="passes through the loop: collect, learn")
    evaluation: EvaluationConfig = EvaluationConfig()
    video: str | None = Field(
        default=None, description="GIF file for one episode of the trained policy, such as out.gif"
    )
    run: RunConfig = RunConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        settings = cls.model_fields["settings"].annotation
        sections: dict[str, type[Section]] = {}
        keys = {"run.micro_tokens"}
        if settings is TabularSettings:
            sections = {
                "rollout": RolloutConfig, "network": NetworkConfig, "optimizer": OptimizerConfig,
                "evaluation": EvaluationConfig,
            }  # fmt: skip
            keys |= {"run.eval_every"}
        elif isinstance(settings, type) and issubclass(settings, Algorithm):
            # there is no reference that a KL could be measured to, and steps are learned from one by one
            idle = (*settings.unread, "kl_in", "kl_estimator", "kl_horizon", "off_policy_threshold")
            keys |= {f"settings.{key}" for key in idle} | (set() if settings.critic else {"rollout.steps"})
            sections = {"optimizer": OptimizerConfig} if settings.update == "trust_region" else {}
        return frozenset(
            keys | {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
        )

    @model_validator(mode="after")
    def _fits(self) -> ControlRecipe:
        learned = self.settings
        if self.video is not None and self.algorithm in TABULAR:
            raise ValueError("video: only runs with networks record one; remove it")
        if self.video is not None and Path(self.video).suffix.lower() != ".gif":
            raise ValueError(f"video {self.video}: a GIF file is written; give a name that ends in .gif")
        if not isinstance(learned, Algorithm):
            if self.critic is not None:
                raise ValueError(f"{self.algorithm} has no critic; remove the section `critic`")
            if self.algorithm == "dqn":
                self._learns(learned)
            return self
        if learned.critic and self.critic is None:
            raise ValueError(f"{learned.title} needs a critic; the section `critic` can not be null")
        if not learned.critic and self.critic is not None:
            raise ValueError(f"{learned.title} has no critic; remove the section `critic`")
        if learned.beta > 0 or learned.kl_target is not None:
            raise ValueError(
                "settings.beta is the price of leaving a reference policy, and there is none in control; set it to 0"
            )
        whole = self.rollout.episodes is not None
        if not learned.critic and not whole:
            raise ValueError(
                f"{learned.title} has no critic to say what a cut episode would still have brought; set "
                "rollout.episodes, so that whole episodes are collected"
            )
        if learned.average == "sequence" or (learned.average == "episode" and not whole):
            raise ValueError(
                f"settings.average = {learned.average}: over fragments of episodes only `token` has a meaning, over "
                "whole ones (rollout.episodes) `token` or `episode`"
            )
        return self

    def _learns(self, settings: DQNSettings) -> None:
        steps = self.iterations * self.rollout.copies * self.rollout.steps
        if steps < settings.learning_starts:
            raise ValueError(
                f"settings.learning_starts is {settings.learning_starts}, and the run has {steps} steps (iterations "
                "x rollout.copies x rollout.steps), so nothing would be learned; lower it, or give more iterations"
            )
        least = {
            "a collection": (self.rollout.copies * self.rollout.steps, "rollout.copies x rollout.steps"),
            "a batch": (settings.batch, "settings.batch"),
            "what is there at the first update": (settings.learning_starts, "settings.learning_starts"),
        }
        for what, (count, keys) in least.items():
            if settings.replay < count:
                raise ValueError(
                    f"settings.replay is {settings.replay:,}, and {what} has {count:,} transitions ({keys}), which "
                    f"it could not hold; raise it to {count:,} at least, or lower the other"
                )


def refusal(algorithm: type[Algorithm]) -> str | None:
    """Why an on-policy algorithm can not be used in control; None where it can."""
    if algorithm.group:
        return "compares several answers to one prompt, and an environment asks no question twice"
    if algorithm.baseline == "greedy":
        return "needs the greedy answer to the same prompt as its baseline, and no two episodes begin alike"
    if algorithm.baseline == "optimal":
        return "needs a reference, and its answers to each prompt before training"
    if algorithm.masks:
        return "masks the unlikely part of a vocabulary; an action space has none to spare"
    return None


def recipe_class(path: Path | None, overrides: list[str]) -> type[ControlRecipe]:
    """The recipe class of the method that the file or the command line names, with that method's defaults.

    Raises SteersmanError for a method that is unknown, or that can not be used in control, with the reason.
    """
    name = str(_chosen(path, overrides))
    if name in RECIPES:
        return RECIPES[name]
    algorithm = load_algorithm(name) if ":" in name else ALGORITHMS.get(name)
    why = f"there is no method {name!r}" if algorithm is None else refusal(algorithm)
    if algorithm is None or why is not None:
        told = why if algorithm is None else f"{algorithm.title} {why}"
        raise SteersmanError(f"algorithm: {told}; for control choose one of {', '.join(KNOWN)}")
    return _on_policy(name, algorithm)


def _chosen(path: Path | None, overrides: list[str]) -> Any:
    """The value of `algorithm`; whatever else is wrong with the recipe is told when it is loaded."""
    given: dict[str, Any] = {}
    apply_overrides(ControlRecipe, given, overrides)
    if "algorithm" in given:
        return given["algorithm"]
    if path is not None and path.is_file():
        try:
            data = load_yaml(path.read_text(encoding="utf-8-sig"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError):
            return "ppo"
        if isinstance(data, dict):
            return data.get("algorithm", "ppo")
    return "ppo"


def _recipe(name: str, settings: Section, **changes: Any) -> type[ControlRecipe]:
    """A recipe class whose defaults are the given settings and sections."""
    run = RunConfig(dir="runs/control", device="cpu", threads=1, eval_every=20, save_every=50)
    literal: Any = Literal[name]  # type: ignore[valid-type]
    fields: dict[str, Any] = {
        "algorithm": (literal, Field(default=name, description=f"the method: {', '.join(KNOWN)}, or {OWN}")),
        "settings": (type(settings), Field(default=settings, description="the method's own settings")),
        "run": (RunConfig, run),
    }
    for key, value in changes.items():
        info = ControlRecipe.model_fields[key]
        fields[key] = (info.annotation, Field(default=value, description=info.description))
    made = create_model(f"ControlRecipe[{name}]", __base__=ControlRecipe, **fields)
    made.__doc__ = ControlRecipe.__doc__
    return made


def _rate(lr: float, **more: Any) -> OptimizerConfig:
    return OptimizerConfig(lr=lr, schedule="linear", eps=1e-5, max_grad_norm=0.5, **more)


def _defaults(name: str) -> type[ControlRecipe]:
    """Defaults that solve CartPole-v1; for other environments see recipes/control-*.yaml."""
    if name in TABULAR:
        return _recipe(name, TabularSettings(), iterations=100)
    if name == "dqn":
        network = NetworkConfig(hidden=[128, 128], activation="relu")
        rollout = RolloutConfig(copies=4, steps=64, reward_scale=0.05)
        return _recipe(name, DQNSettings(), rollout=rollout, network=network, iterations=400, optimizer=_rate(1e-3))
    return _on_policy(name, ALGORITHMS[name])


def _on_policy(name: str, algorithm: type[Algorithm]) -> type[ControlRecipe]:
    given = DEFAULTS.get(name, {})
    settings = algorithm(**{"gamma": 0.99, "beta": 0.0, "average": "token", **given.get("settings", {})})
    critic = CriticConfig(optimizer=_rate(given.get("critic_lr", 1e-3))) if algorithm.critic else None
    # Returns are tens to hundreds here, and a fresh critic answers near 0: scaled, it need not climb there first.
    scaled = {"reward_scale": 0.02} if algorithm.critic else {"episodes": 8}
    rollout = RolloutConfig(**{**scaled, **given.get("rollout", {})})
    return _recipe(
        name,
        settings,
        rollout=rollout,
        optimizer=_rate(given.get("lr", 1e-3)),
        critic=critic,
        iterations=given.get("iterations", 100),
    )


DEFAULTS: dict[str, dict[str, Any]] = {
    "reinforce": {"settings": {"average": "episode"}, "lr": 1e-2, "iterations": 150},
    "reinforce-baseline": {
        "settings": {"average": "episode"},
        "rollout": {"episodes": 8},
        "lr": 1e-2,
        "critic_lr": 1e-2,
    },
    "reinforce++": {"lr": 1e-2},
    "a2c": {"settings": {"lam": 0.97}, "rollout": {"steps": 64}, "lr": 1.5e-3, "iterations": 450},
    "trpo": {"settings": {"epochs": 6, "minibatches": 4}, "iterations": 80},
    "ppo": {"settings": {"epochs": 6, "minibatches": 4}, "lr": 3e-3, "iterations": 50},
    "ppo-kl": {"settings": {"epochs": 6, "minibatches": 4}, "lr": 3e-3, "iterations": 50},
}
KNOWN = [*(n for n, algorithm in ALGORITHMS.items() if refusal(algorithm) is None), "dqn", *TABULAR]
OWN = "my_method.py:Class"
RECIPES = {name: _defaults(name) for name in KNOWN}
