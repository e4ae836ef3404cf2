"""The section `model`: which model, what of it is trained, how it is saved; and the rate that adapters begin with."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.model.adapter_files import saved_lora
from steersman.model.quantise import Quantise


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
        description="names of linear layers or of experts' matrices (gate_up_proj), a regular expression over whole "
        "names, or all-linear",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout on the adapters' inputs, in training passes only"
    )
    dora: bool = Field(
        default=False, description="DoRA: learn the length of each row of a weight apart from its direction"
    )
    rslora: bool = Field(default=False, description="rsLoRA: scale by alpha / sqrt(r), for high ranks")
    train_whole: list[str] = Field(
        default_factory=list,
        description="modules that are trained whole beside the adapters, such as norm; "
        "embeddings and an output layer that are one matrix stay one, whichever is named",
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
