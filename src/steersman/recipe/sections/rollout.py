"""The section `rollout`: what is sampled, where, by which weights, and how stale samples are corrected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from steersman.config.sections import Section
from steersman.loss.correction import CAPS, Correction, Kind
from steersman.ops.distributions import LEAST_TEMPERATURE

if TYPE_CHECKING:
    from steersman.rollout import Sampling

LEARNED_ONLY = ("recompute_logp", "correction", "ahead", "in_flight")
"""Keys of `rollout` that say how samples are learned from."""
PLACE_ONLY = ("max_batch", "servers", "url", "python", "arguments", "timeout", "folder")
"""Keys of `rollout` that say where samples are made and how many at a time, and nothing of what is sampled."""


class CorrectionConfig(Section):
    """With `recompute_logp`: how steps are weighed that another policy sampled, an older one or another engine's."""

    kind: Kind = Field(
        default="token_truncated",
        description="none, decoupled (uncut), token_truncated, token_masked, sequence_truncated, sequence_masked, "
        "geometric_masked or k3_masked; docs/algorithms.md says what each leaves biased",
    )
    cap: float = Field(
        default_factory=lambda known: CAPS.get(known.get("kind", "none"), 2.0),
        gt=0,
        description="largest ratio pi_train / pi_rollout (k3_masked: nats per token); by kind if not given",
    )
    low: float = Field(
        default=0.5, ge=0, le=1, description="smallest ratio that counts, for token_masked and geometric_masked"
    )

    @model_validator(mode="after")
    def _fits(self) -> CorrectionConfig:
        if self.kind != "k3_masked" and self.cap < 1:
            raise ValueError(
                f"cap is {self.cap}: a ratio of 1, where the policies agree, must count; give at least 1"
            )
        return self

    def correction(self) -> Correction:
        return Correction(self.kind, self.cap, self.low)


VLLM_TEMPERATURE = 2.0
"""vLLM refuses a request of a higher temperature."""


def not_zero(temperature: Any) -> Any:
    """A temperature as it is given. Raises ValueError for 0, with what stands for it."""
    if temperature == 0:
        raise ValueError(
            "logits can not be divided by 0; for the likeliest token each time set top_k: 1 beside it "
            "(where responses are only sampled, as by generate: greedy: true in its place)"
        )
    return temperature


class RolloutConfig(Section):
    """What is sampled in each iteration."""

    prompts: int = Field(default=32, ge=1, description="prompts per iteration")
    samples: int = Field(default=1, ge=1, description="responses per prompt")
    max_new_tokens: int = Field(default=64, ge=1, description="longest response, in tokens")
    min_new_tokens: int = Field(default=0, ge=0, description="the end token is not sampled before this many")
    temperature: float = Field(
        default=1.0, ge=LEAST_TEMPERATURE, description="logits are divided by it, while sampling and in the loss"
    )
    top_k: int = Field(default=0, ge=0, description="sample among the k likeliest tokens; 0 is off")
    top_p: float = Field(default=1.0, gt=0, le=1, description="sample from the smallest set of this mass; 1 is off")
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="drop tokens below this share of the likeliest; 0 is off"
    )
    stop: list[str] = Field(default_factory=list, description="strings that end a response")
    eos_token_id: list[int] = Field(
        default_factory=list, description="ids that end a response; empty takes the model's own"
    )
    max_batch: int = Field(default=128, ge=1, description="sequences decoded side by side")
    recompute_logp: bool = Field(
        default=False,
        description="compute the old log-probabilities by training's own forward pass instead of taking the "
        "sampler's, and weigh each step as `correction` says; for samplers with another engine or precision",
    )
    correction: CorrectionConfig = CorrectionConfig()
    held_out: int = Field(
        default=16,
        ge=0,
        description="prompts that are answered at every evaluation: held-out ones, or, where data.held_out and "
        "data.held_out_files hold none out, the last training prompts. On-policy verbs and distill train on those "
        "too, so that held_out/... do not tell of new prompts; the loops leave them out of training. 0: none",
    )
    engine: Literal["inside", "process", "vllm"] = Field(
        default="inside",
        description="what samples. inside: steersman's engine in this process; process: the same engine in a "
        "process of its own; vllm: vLLM servers. Other processes get the weights after each update",
    )
    servers: int = Field(default=1, ge=1, description="how many processes or vLLM servers are started and watched")
    url: list[str] = Field(
        default_factory=list, description="addresses of servers that run already; none is started then"
    )
    python: str | None = Field(
        default=None, description="path of another environment's Python that has vLLM, where steersman's own has not"
    )
    arguments: list[str] = Field(
        default_factory=list, description="further arguments of vLLM's command line, such as --tensor-parallel-size 2"
    )
    timeout: float = Field(
        default=600.0, gt=0, description="seconds that a server may take to start or to answer one request"
    )
    sync: Literal["weights", "adapter"] = Field(
        default="weights",
        description="what is sent to other processes after each update. weights: all weights, with adapters merged "
        "in; adapter: with model.lora the adapter alone, under a name with its version (the servers hold the base)",
    )
    folder: str | None = Field(
        default=None,
        description="where weights are written for servers to read; null is shared memory of this machine. "
        "Servers on other machines need a folder of a file system that they share with this one",
    )
    tolerance: float | None = Field(
        default=None,
        gt=0,
        description="largest difference, in nats, of a server's log-probabilities from the policy's after weights "
        "were sent; null: 1e-4 in float32, 0.15 in bfloat16",
    )
    ahead: int = Field(
        default=0,
        ge=0,
        description="how many batches may be sampled and rewarded in advance, while the policy learns from earlier "
        "ones. No token is trained on that was sampled by weights more than this many versions old. 0: none, "
        "on-policy",
    )
    in_flight: Literal["finish", "cut"] = Field(
        default="finish",
        description="with ahead: answers under way when new weights are ready. finish: the weights that began them "
        "finish them (the schedule is then the same every time); cut: they are cut, and go on under the new "
        "weights",
    )

    _greedy = field_validator("temperature", mode="before")(not_zero)

    @field_validator("sync", "engine", mode="before")
    @classmethod
    def _offered(cls, value: Any) -> Any:
        if value in ("nccl", "ipc"):
            raise ValueError(
                f"{value} is a route between GPUs that steersman does not have; weights travel in a file, in shared "
                "memory or in rollout.folder (sync: weights, or adapter)"
            )
        if value == "colocated":
            raise ValueError(
                "vLLM inside the learner's process, asleep while it trains, needs CUDA and is not offered; engine "
                "vllm starts servers of their own"
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> RolloutConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens ({self.max_new_tokens})"
            )
        apart = self.servers > 1 or self.url or self.arguments or self.sync == "adapter" or self.folder
        if self.engine == "inside" and apart:
            raise ValueError(
                "servers, url, arguments, sync and folder are about other processes, and engine is inside; choose "
                "process or vllm"
            )
        if self.engine == "inside" and self.ahead:
            raise ValueError(
                "ahead samples while the policy learns, which needs weights of its own: set engine to process or vllm"
            )
        if self.engine == "vllm" and self.temperature > VLLM_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature:g}, and vLLM takes none above {VLLM_TEMPERATURE:g}; lower it, or "
                "set engine to inside or process"
            )
        if self.url and self.servers > 1:
            raise ValueError(
                "url names servers that run already, and servers says how many to start; give one of both"
            )
        return self

    def sampling(self) -> Sampling:
        """How tokens are drawn, as the engine takes it."""
        from steersman.rollout import Sampling  # here, so that a recipe is read without the engine

        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            min_new_tokens=self.min_new_tokens,
            stop=tuple(self.stop),
        )
