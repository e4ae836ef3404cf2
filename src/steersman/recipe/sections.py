"""Recipe sections that several verbs share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from steersman.config.sections import Section
from steersman.loss.correction import CAPS, Correction, Kind
from steersman.model.adapter_files import saved_lora
from steersman.model.quantise import Quantise
from steersman.ops.distributions import LEAST_TEMPERATURE

if TYPE_CHECKING:
    from steersman.distributed.parallel import ParallelConfig
    from steersman.rollout import Sampling
    from steersman.run.run_config import ManyRunConfig
    from steersman.update.optimizer import OptimizerConfig


class LoraSection(Section):
    """Low-rank adapters; without this section all weights are trained, or the adapters that `path` holds."""

    r: int = Field(default=8, ge=1, description="rank")
    alpha: float = Field(
        default_factory=lambda known: 2.0 * known.get("r", 8),
        gt=0,
        description="the update is scaled by alpha / r; 2 r if not given, so that the scale is 2 at every rank",
    )
    targets: str | list[str] = Field(
        default="all-linear",
        description="names of linear layers, a regular expression over whole names, or all-linear",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout on the adapters' inputs, in training passes only"
    )
    dora: bool = Field(
        default=False, description="DoRA: learn the length of each row of a weight apart from its direction"
    )
    rslora: bool = Field(default=False, description="rsLoRA: scale by alpha / sqrt(r), for high ranks")
    train_whole: list[str] = Field(
        default_factory=list, description="modules that are trained whole beside the adapters, such as norm"
    )


class ModelConfig(Section):
    """Which model, in which precision, and what of it is trained."""

    path: str = Field(description="folder or hub name of a model; with `scratch`, of a tokenizer")
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the model's folder; read it first"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        default="float32",
        description="precision of weights and arithmetic: float32, bfloat16, float16, float64 (for checks), or "
        "auto (bfloat16 where CUDA has it, else float32)",
    )
    attention: str | None = Field(
        default=None, description="transformers' attention implementation; null is its choice"
    )
    quantise: Quantise = Field(
        default="none",
        description="how the linear layers of a frozen base are stored: nf4 or fp4 (4 bits), int8, or none (as "
        "`dtype`); quantised ones need lora",
    )
    lora: LoraSection | None = Field(
        default=None,
        description="train low-rank adapters only; reward models and critics train their heads beside them. If "
        "`path` is a folder of saved adapters, those are trained, with their own rank and layers, also without "
        "this section",
    )
    merge: bool = Field(
        default=True,
        description="with lora: save the whole model with the adapters merged in; false: save only what was trained",
    )
    save_dtype: Literal["same", "float32", "bfloat16", "float16"] = Field(
        default="same",
        description="precision of the saved weights: float32, bfloat16, float16, or same (that of the model that "
        "`path` names). If it is coarser than in training, weights are rounded up or down at random, so that small "
        "updates are kept on average",
    )
    max_shard_size: str = Field(
        default="5GB",
        pattern=r"^\d+(\.\d+)?(KB|MB|GB)$",
        description="largest file of the saved model's weights, such as 5GB or 500MB",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations again instead of keeping them"
    )
    offload_activations: bool = Field(
        default=False,
        description="with gradient_checkpointing: keep the inputs of checkpointed layers in the CPU's memory until "
        "the backward pass, which costs two copies; on a CPU they are there anyway",
    )
    scratch: dict[str, Any] | None = Field(
        default=None, description="config fields of a model with fresh weights, model_type among them"
    )

    @model_validator(mode="after")
    def _offloads_what_is_kept(self) -> ModelConfig:
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "model.offload_activations is for what checkpointed layers keep; set model.gradient_checkpointing: "
                "true, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _quantised(self) -> ModelConfig:
        if self.quantise != "none" and self.scratch is not None:
            raise ValueError("model.quantise is for a frozen base, and model.scratch has fresh weights to train")
        if self.quantise == "int8" and self.lora is not None and self.lora.dora:
            raise ValueError("model.lora.dora reads the base's weights at every step; with quantise use nf4 or fp4")
        return self


TRAINED_ONLY = (
    "lora",
    "merge",
    "save_dtype",
    "max_shard_size",
    "gradient_checkpointing",
    "offload_activations",
    "scratch",
)
"""Keys of `model` that say what is trained and how it is saved."""


ADAPTER_RATE = 5e-4
"""Peak rate of low-rank adapters where a recipe gives none. Adapters want about ten times the rate of whole models or
more; on a chat model of 135M parameters DPO hardly moved at 1e-5 and 1e-4, and did at this rate."""


def adapter_defaults(given: dict[str, Any], *optimizers: str) -> dict[str, Any]:
    """Nested defaults of a recipe that, as it is given, trains adapters: the rate of adapters for the optimizers at
    these dotted keys. Where `model.path` is a folder of saved adapters, which are trained whether or not the recipe
    has `model.lora`, that is what they are."""
    model = given.get("model")
    if not isinstance(model, dict):
        return {}
    if model.get("lora") is not None:
        return adapter_rates(*optimizers)
    saved = saved_lora(str(model.get("path"))) if model.get("scratch") is None else None
    return {} if saved is None else {"model": {"lora": saved}, **adapter_rates(*optimizers)}


def adapter_rates(*optimizers: str) -> dict[str, Any]:
    """Nested defaults: the rate of adapters for the optimizers at these dotted keys."""
    out = dict[str, Any]()
    for key in optimizers:
        section = out
        for name in key.split("."):
            section = section.setdefault(name, {})
        section["lr"] = ADAPTER_RATE
    return out


HALF = ("bfloat16", "float16")


class TrainingRecipe(Section):
    """A recipe that trains `model` by `optimizer`, with a default rate for what is trained; on several devices as
    `run` and `parallel` say.

    Raises ValueError for what can not be laid over them.
    """

    if TYPE_CHECKING:  # each recipe has these fields, at a place of its own
        model: ModelConfig
        optimizer: OptimizerConfig
        run: ManyRunConfig
        parallel: ParallelConfig

    @classmethod
    def dependent_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        return adapter_defaults(given, *(["optimizer"] if "optimizer.lr" not in cls.unread_keys() else []))

    @property
    def optimizers(self) -> dict[str, OptimizerConfig]:
        """What updates the weights of each model, by its key."""
        return {"optimizer": self.optimizer}

    @model_validator(mode="after")
    def _fits_its_devices(self) -> TrainingRecipe:
        devices, copies = self.run.ranks, self.parallel.replicas
        if devices > 1 and devices % copies:
            raise ValueError(f"parallel.replicas is {copies}, which does not divide the {devices} devices")
        if self.parallel.stage:
            self._fits_deepspeed()
        if self.parallel.mode != "fsdp":
            return self
        if self.model.quantise != "none":
            raise ValueError(
                f"model.quantise {self.model.quantise}: quantised weights can not lie in pieces; use parallel.mode: "
                "replicas, or parallel.compute_dtype: bfloat16 without quantise"
            )
        for key, optimizer in self.optimizers.items():
            if optimizer.kind != "adamw":
                raise ValueError(
                    f"{key}.kind {optimizer.kind} looks at whole matrices or blocks of them, and parallel.mode fsdp "
                    "has pieces; use adamw, or mode: replicas"
                )
            if self.model.dtype in HALF and self.model.lora is None and optimizer.rounding != "nearest":
                raise ValueError(
                    f"{key}.rounding {optimizer.rounding} keeps more of {self.model.dtype} weights than they hold, "
                    "which parallel.mode fsdp does not; use model.dtype: float32 with parallel.compute_dtype: "
                    "bfloat16, which computes in half of it, or mode: replicas"
                )
        return self

    def _require_movable(self) -> None:
        """Raises ValueError where frozen models can not wait in the CPU's memory, as `offload` asks: in pieces, or
        quantised."""
        if self.parallel.in_pieces:
            raise ValueError(
                f"offload moves whole models; in parallel.mode {self.parallel.mode} they lie in pieces. Use mode: "
                "fsdp with parallel.offload: true, which keeps the pieces of every model in the CPU's memory, or "
                "replicas"
            )
        if self.model.quantise != "none":
            raise ValueError("offload: quantised weights stay on the device; remove model.quantise, or offload")

    def _fits_deepspeed(self) -> None:
        """What ZeRO refuses, in the recipe and in DeepSpeed's own file."""
        mode = self.parallel.mode
        if self.model.quantise != "none":
            raise ValueError(f"model.quantise {self.model.quantise}: mode {mode} is not tried with it; use replicas")
        if self.model.dtype not in ("auto", "float32") and self.model.lora is None:
            raise ValueError(
                f"model.dtype {self.model.dtype}: parallel.mode {mode} trains float32 weights; use float32, or "
                "parallel.mode: fsdp with compute_dtype: bfloat16, which computes in half of it"
            )
        for key, optimizer in self.optimizers.items():
            if optimizer.kind != "adamw":
                raise ValueError(
                    f"{key}.kind {optimizer.kind}: parallel.mode {mode} cuts all weights into equal pieces, which "
                    "plain adamw alone can update; use adamw, or mode: replicas"
                )
        clips = {f"{key}.max_grad_norm": optimizer.max_grad_norm for key, optimizer in self.optimizers.items()}
        self.parallel.deepspeed_settings(clips)


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
        raise ValueError("logits can not be divided by 0; for the likeliest token each time set top_k: 1 beside it")
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
