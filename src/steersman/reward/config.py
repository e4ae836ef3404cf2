"""The recipe's `reward` section, and the reward that it describes."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from steersman.config.sections import Section
from steersman.metrics import METRICS, metric
from steersman.metrics.workers import Parallel
from steersman.model import SharedBase, load_reward, place
from steersman.reward import shaping
from steersman.reward.core import CallableReward, Reward, WeightedSum
from steersman.reward.episodes import EpisodeReward
from steersman.reward.metrics import MetricReward
from steersman.reward.models import ModelReward
from steersman.reward.rules import BUILTINS
from steersman.types import Stats, SteersmanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_KINDS = ("model", "function", "builtin", "metric", "environment")


class RewardPart(Section):
    """One reward: exactly one of model, function, builtin, metric and environment."""

    model: str | None = Field(default=None, description="folder or hub name of a reward model")
    function: str | None = Field(default=None, description="module:function or path/to/file.py:function")
    builtin: str | None = Field(default=None, description=f"one of: {', '.join(BUILTINS)}")
    metric: str | None = Field(
        default=None, description="name of a metric (docs/metrics.md), module:Class or path/to/file.py:Class"
    )
    environment: Literal["turn", "episode"] | None = Field(
        default=None,
        description="rewards that the recipe's environment pays. turn: each at the end of its turn; episode: their "
        "sum at the end of the last turn",
    )
    weight: float = Field(default=1.0, description="factor in the sum; negative to punish")
    args: dict[str, Any] = Field(
        default_factory=dict, description="fixed settings of the function, builtin or metric"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="parameter of the function, or input of the metric: the data's column that fills it",
    )
    empty: float | None = Field(
        default=None, description="a metric's score of an empty response; null leaves it to the metric"
    )
    time_limit: float | None = Field(
        default=3600.0, gt=0, description="seconds that one call of a function or builtin may take; null: no limit"
    )
    workers: int = Field(default=0, ge=0, description="processes that share a metric's work; 0 is this one alone")
    text_bridge: bool = Field(default=True, description="let a reward model with another tokenizer read decoded text")
    attribute: str | None = Field(
        default=None, description="the attribute that counts, of a reward model that has several"
    )
    steps: Literal["mean", "sum", "min"] = Field(
        default="mean",
        description="how a reward model of steps, which gives each of K steps a probability p of being right, "
        "pays. mean: p / K at the end of each step; sum: p at the end of each; min: the smallest p alone, at its "
        "own step",
    )
    pessimism: float = Field(
        default=0.0,
        ge=0,
        description="reward models of several heads: score = mean - pessimism x standard deviation of the heads; "
        "with a bottleneck: score - pessimism x KL of its latents from N(0, I), in nats",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> RewardPart:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}; {' and '.join(given) or 'none'} given")
        if self.builtin is not None and self.builtin not in BUILTINS:
            near = difflib.get_close_matches(self.builtin, BUILTINS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(BUILTINS)}"
            raise ValueError(f"there is no builtin reward '{self.builtin}'; {hint}")
        if (self.model is not None or self.environment is not None) and (self.args or self.columns):
            raise ValueError(
                "args and columns belong to a function, builtin or metric, not to a model or environment"
            )
        if self.model is None and (self.attribute is not None or self.steps != "mean" or self.pessimism):
            raise ValueError("attribute, steps and pessimism belong to a model")
        if self.metric is None and (self.empty is not None or self.workers):
            raise ValueError("empty and workers belong to a metric")
        if self.metric is not None and self.metric not in METRICS and ":" not in self.metric:
            near = difflib.get_close_matches(self.metric, METRICS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(METRICS)}"
            raise ValueError(f"there is no metric '{self.metric}'; {hint}")
        return self


class RewardConfig(Section):
    """What is rewarded, and how scores are shaped before they become rewards of tokens."""

    parts: dict[str, RewardPart] = Field(default_factory=dict, description="name: reward; they are summed")
    normalise: bool = Field(
        default=False, description="subtract the running mean of scores, divide by their deviation"
    )
    clip: float | None = Field(default=None, gt=0, description="scores are cut to [-clip, clip], after normalising")
    missing_eos_penalty: float = Field(
        default=0.0, ge=0, description="subtracted where the length limit cut a response"
    )
    overlong_buffer: int = Field(
        default=0, ge=0, description="tokens before the length limit over which the score falls by 1 (DAPO); 0: off"
    )
    whiten: bool = Field(default=False, description="scale token rewards to unit variance over the batch")


def build_reward(
    config: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str = "cpu",
    base: SharedBase | None = None,
    *,
    apart: bool = False,
) -> WeightedSum:
    """The reward that the section describes; `tokenizer` is the policy's. Reward models that are adapters on `base`
    stand on it, others have weights of their own: whole ones where the device is `apart` from those that train, else
    laid as all models are.

    Raises SteersmanError when there is no part, or a part's model or function does not load or fit.
    """
    if not config.parts:
        raise SteersmanError(
            "reward.parts: no reward given; for instance `parts: {mood: {builtin: vader_sentiment}}`"
        )
    return WeightedSum(
        {
            name: (part.weight, _build_part(name, part, tokenizer, device, base, apart))
            for name, part in config.parts.items()
        }
    )


def _build_part(
    name: str,
    part: RewardPart,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
    base: SharedBase | None,
    apart: bool,
) -> Reward:
    if part.builtin is not None:
        return CallableReward(BUILTINS[part.builtin], name, part.args, part.columns, part.time_limit)
    if part.function is not None:
        return CallableReward(part.function, name, part.args, part.columns, part.time_limit)
    if part.metric is not None:
        return _metric_part(name, part)
    if part.environment is not None:
        return EpisodeReward(name, part.environment)
    assert part.model is not None
    if base is None:
        model = load_reward(part.model, device=device, trainable=False)
    else:
        model = base.reward(part.model, device)
    reward = ModelReward(
        model,
        tokenizer,
        name=name,
        text_bridge=part.text_bridge,
        attribute=part.attribute,
        steps=part.steps,
        pessimism=part.pessimism,
    )
    if not apart:
        place(model)
    return reward


def _metric_part(name: str, part: RewardPart) -> MetricReward:
    assert part.metric is not None
    made = Parallel(part.metric, part.args, part.workers) if part.workers else metric(part.metric, part.args)
    if made.better == "lower" and part.weight > 0:
        raise SteersmanError(
            f"reward '{name}': a lower {made.name} is better, and its weight is {part.weight:g}; "
            f"give it a negative weight"
        )
    return MetricReward(made, name, part.columns, part.empty)


class ScoreShaping:
    """The section's settings applied to the scores of a batch; `state_dict` belongs in checkpoints.

    In this order: normalise, clip, missing-EOS penalty, overlong penalty; so the penalties are in units of the
    normalised score and clipping can't hide them.
    """

    def __init__(self, config: RewardConfig):
        self.config, self.norm = config, shaping.RunningNorm()

    def __call__(
        self, scores: Tensor, terminated: Tensor, length: Tensor, max_length: int, *, update: bool = True
    ) -> tuple[Tensor, Stats]:
        """Shaped scores [B] from raw ones, `terminated` [B], response `length` [B] in tokens and its limit.

        Without `update` the running mean and deviation stay as they are (for a baseline's scores).
        """
        config, raw = self.config, scores
        if config.normalise:
            if update:
                self.norm.update(scores)
            scores = self.norm.normalise(scores)
        if config.clip is not None:
            scores = scores.clamp(-config.clip, config.clip)
        scores = shaping.missing_eos_penalty(scores, terminated, config.missing_eos_penalty)
        if config.overlong_buffer:
            scores = scores + shaping.overlong_penalty(length, max_length, config.overlong_buffer)
        spread = float(raw.std(correction=0))
        return scores, {
            "score/mean": float(raw.mean()),
            "score/std": spread,
            "score/shaped": float(scores.mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.norm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norm.load_state_dict(state)
