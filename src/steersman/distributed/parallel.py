"""The recipe's `parallel` section: how the processes of one run share the work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.distributed.deepspeed_file import read_deepspeed
from steersman.extras import require

WITH_FSDP = ("replicas", "reduce_dtype", "compute_dtype", "reshard", "offload")
"""Keys that say something in mode fsdp alone."""


class ParallelConfig(Section):
    """How the devices of `run.devices` share one run."""

    mode: Literal["replicas", "fsdp", "zero1", "zero2", "zero3"] = Field(
        default="replicas",
        description="replicas: every device holds the whole models, and gradients are summed; fsdp: weights, "
        "gradients and optimizer state are sharded over the devices (PyTorch's FSDP2); zero1: whole models, "
        "sharded optimizer state (DeepSpeed); zero2: gradients sharded too; zero3: weights too",
    )
    deepspeed: str | None = Field(
        default=None,
        description="with zero1 to zero3: a JSON file of DeepSpeed's own settings; what the recipe says already is "
        "refused in it",
    )
    replicas: int = Field(
        default=1,
        ge=1,
        description="with fsdp: copies of the sharded model, such as one a node; devices / replicas hold one copy",
    )
    reduce_dtype: Literal["same", "float32", "bfloat16"] = Field(
        default="same",
        description="with fsdp: precision in which gradients are summed over devices: float32, bfloat16, or same "
        "(as they were computed)",
    )
    compute_dtype: Literal["same", "float32", "bfloat16"] = Field(
        default="same",
        description="with fsdp: precision of forward and backward passes: float32, bfloat16, or same (that of the "
        "weights). The stored shards keep their own precision",
    )
    reshard: bool = Field(
        default=True,
        description="with fsdp: free a layer's gathered weights after its forward pass; false is faster and takes "
        "more memory",
    )
    offload: bool = Field(default=False, description="with fsdp: keep the shards in the CPU's memory between uses")
    timeout: float = Field(
        default=1800.0, gt=0, description="seconds that a rank waits for the others in one call before it gives up"
    )
    tensor: int = Field(default=1, ge=1, description="devices that share each layer's matrices; only 1 so far")
    context: int = Field(default=1, ge=1, description="devices that share each sequence; only 1 so far")

    @property
    def stage(self) -> int:
        """The stage of DeepSpeed's ZeRO, 0 where another engine lays the weights."""
        return int(self.mode[-1]) if self.mode.startswith("zero") else 0

    @property
    def in_pieces(self) -> bool:
        """Whether weights lie in pieces over the devices."""
        return self.mode in ("fsdp", "zero3")

    def deepspeed_settings(self, clips: Mapping[str, float]) -> dict[str, Any]:
        """What `deepspeed` names, as DeepSpeed takes it, without a clip; empty where no file is named.

        Raises ValueError for what the recipe says in another way, a clip that is not each of `clips` among it, which
        stand by their keys in the recipe.
        """
        return {} if self.deepspeed is None else read_deepspeed(Path(self.deepspeed), self.stage, clips)

    def require_engine(self) -> None:
        """Raises SteersmanError where what lays the weights is not installed, with the extra to install."""
        if self.stage:
            require(f"parallel.mode {self.mode}", "deepspeed")

    @model_validator(mode="after")
    def _fits(self) -> ParallelConfig:
        for name, value in (("tensor", self.tensor), ("context", self.context)):
            if value > 1:
                raise ValueError(f"{name} is {value}: {name} parallelism is not there yet; use mode: fsdp")
        for name in WITH_FSDP if self.mode != "fsdp" else ():
            if self.__dict__[name] != type(self).model_fields[name].default:
                raise ValueError(f"{name} goes with mode: fsdp, and mode is {self.mode}")
        if self.deepspeed is not None and not self.stage:
            raise ValueError(f"deepspeed goes with mode: zero1, zero2 and zero3, and mode is {self.mode}")
        return self


class WithoutZeroConfig(ParallelConfig):
    """The same for verbs that DeepSpeed does not serve."""

    @model_validator(mode="after")
    def _has_no_stage(self) -> WithoutZeroConfig:
        if self.stage:
            raise ValueError(
                f"mode {self.mode} serves sft, reward, dpo, kto, bco and on-policy methods, not this verb; use fsdp "
                "or replicas"
            )
        return self
