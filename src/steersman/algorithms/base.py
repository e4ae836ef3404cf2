"""What an on-policy algorithm is: hyper-parameters, and which advantage and loss it chooses.

The loop (`train/on_policy.py` for language models, `control/` for Gymnasium, `verify/training.py` for the
exact oracle) is the same for all. To add one: a file with a subclass, and a line in `algorithms/__init__.py`.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.config.sections import Section
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.ops.kl import KLEstimator
from steersman.types import Trajectory


class Coefficients(NamedTuple):
    """Coefficients that a controller may move: `beta` on KL to the reference, `beta_old` on KL to the sampler."""

    beta: float = 0.0
    beta_old: float = 0.0


class SamplingMask(NamedTuple):
    """Actions are limited to the top-p set of a copy of the policy that is made anew every `every` iterations."""

    top_p: float
    min_tokens: int
    every: int


class OptimalValue(NamedTuple):
    """V*(x) = beta log mean exp(r / beta) over `samples` responses of the reference to each prompt, before training.

    Prompts of which no response scores above `solved_above` are left out; None keeps all.
    """

    beta: float
    samples: int
    solved_above: float | None


class TrustRegion(NamedTuple):
    """One step inside the ball KL(old || new) <= max_kl; see `steersman.update.natural.trust_region_step`."""

    max_kl: float
    cg_steps: int
    damping: float
    backtracks: int
    backtrack_ratio: float


class Algorithm(Section):
    """Hyper-parameters that every on-policy algorithm has; a subclass adds its own, an advantage and a loss."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    bias: ClassVar[str] = ""
    """Why the estimator's expectation is not the exact gradient; empty where it is."""
    fixed_point: ClassVar[str] = ""
    """Where training comes to rest if not at the KL-regularised optimum; empty where it is that."""
    critic: ClassVar[bool] = False
    group: ClassVar[bool] = False
    """Compares the samples of one prompt, so needs at least two of them."""
    baseline: ClassVar[Literal["none", "greedy", "moving", "optimal"]] = "none"
    """What a row is compared with: nothing, the greedy response's score, a moving mean, V* (`optimal_value` says how
    it is estimated)."""
    update: ClassVar[Literal["gradient", "trust_region"]] = "gradient"
    """How the actor moves; `trust_region()` says where."""
    masks: ClassVar[bool] = False
    """Limits the actions by a mask over a vocabulary."""
    own_in_baseline: ClassVar[bool] = False
    """The baseline of a sample contains the sample, so the gradient is (G - 1) / G times what it would be without."""
    whole_episode: ClassVar[str] = ""
    """Why all steps of an episode need one advantage; empty where a turn may have its own (`turns_refused`)."""
    parts: ClassVar[bool] = False
    """Reads the rewards that a score is added up from, before any shaping of their sum."""
    unread: ClassVar[tuple[str, ...]] = ()
    """Settings of the class above that the method does not use."""

    gamma: float = Field(default=1.0, ge=0, le=1, description="discount per token (or step)")
    beta: float = Field(default=0.05, ge=0, description="coefficient of KL(policy || reference)")
    kl_in: Literal["reward", "loss"] = Field(
        default="reward", description="where the KL term goes: into every token's reward, or into the loss"
    )
    kl_estimator: KLEstimator = Field(
        default="k1", description="k1, k2, k3 or k1_to_go; see steersman.ops.kl for their bias"
    )
    kl_target: float | None = Field(
        default=None, gt=0, description="KL in nats per response that beta is steered to; null keeps beta fixed"
    )
    kl_horizon: float = Field(
        default=10_000,
        gt=0,
        description="with kl_target: samples over which beta changes by about 20% at most; larger is slower",
    )
    entropy_coef: float = Field(default=0.0, ge=0, description="weight of the entropy bonus")
    average: Average = Field(default="token", description=AVERAGED_BY)
    top_entropy: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="train on this share of the tokens only, those of highest entropy; 1: all",
    )
    off_policy_threshold: float | None = Field(
        default=None,
        gt=0,
        description="leave out tokens with negative advantage of responses that the policy now finds less likely "
        "than when they were sampled by more than this (mean nats per token); null: none",
    )
    epochs: int = Field(default=1, ge=1, description="passes over the samples of one iteration")
    minibatches: int = Field(default=1, ge=1, description="optimizer updates per epoch")
    stop_kl: float | None = Field(
        default=None,
        gt=0,
        description="stop an iteration's updates when KL to the sampler exceeds this, nats per token",
    )

    def clip_range(self) -> tuple[float, float] | None:
        """How far below and above 1 the ratio may be before it is clipped; None where it is not."""
        return None

    def log_ratio(self, logp: Float[Tensor, "B T"], traj: Trajectory) -> Float[Tensor, "B T"]:
        """The logarithm of the ratio that `clip_range` bounds, at each step."""
        return logp - traj.logp_old

    def resampling(self) -> int:
        """How many further rounds may be sampled to replace groups that teach nothing."""
        return 0

    def sampling_mask(self) -> SamplingMask | None:
        """What limits the actions while sampling and in the loss; None where nothing does."""
        return None

    def optimal_value(self) -> OptimalValue | None:
        """What must be known of every prompt before training; None where nothing must."""
        return None

    def gradient_scale(self) -> float:
        """The fixed number that the exact gradient is multiplied with because of how the loss is written."""
        return 1.0

    def trust_region(self) -> TrustRegion | None:
        """The ball that the actor's one step stays in; None where the actor learns by gradient steps."""
        return None

    def kl_to_sampler(self) -> tuple[float, float] | None:
        """The first coefficient of KL(old || new) and the KL per token that it is steered to; None without it."""
        return None

    def refusal(self, samples: int) -> str | None:
        """Why it can not learn from so many samples per prompt; None where it can."""
        return None

    def turns_refused(self) -> str:
        """Why it can not compare each turn with the same turn of other episodes (`environment.baseline_per` turn);
        empty where it can."""
        if not self.group:
            return "compares no samples of one prompt"
        if self.parts:
            return "compares each part of the reward, and parts are told of whole episodes alone"
        return self.whole_episode

    def advantage(self, traj: Trajectory) -> Advantage:
        """Advantages `[B, T]`, and the critic's targets where there is one."""
        raise NotImplementedError

    def loss(
        self, logp: Float[Tensor, "B T"], traj: Trajectory, adv: Float[Tensor, "B T"], coef: Coefficients
    ) -> Float[Tensor, "B T"]:
        """The policy's loss per step, without the entropy bonus and the KL term to the reference."""
        raise NotImplementedError
