"""The recipe's `parallel` section: how the processes of one run share the work."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section


class ParallelConfig(Section):
    """How the devices of `run.devices` share one run."""

    mode: Literal["replicas", "fsdp"] = Field(
        default="replicas",
        description="replicas: every device holds the whole models and gradients are added up; fsdp: weights, "
        "gradients and optimizer state lie in pieces over the devices (PyTorch's FSDP2)",
    )
    replicas: int = Field(
        default=1,
        ge=1,
        description="with fsdp: copies of the sharded model, such as one a node; devices / replicas hold one copy",
    )
    reduce_dtype: Literal["same", "float32", "bfloat16"] = Field(
        default="same", description="with fsdp: precision in which gradients are added up"
    )
    compute_dtype: Literal["same", "float32", "bfloat16"] = Field(
        default="same", description="with fsdp: precision of forward and backward; the pieces keep their own"
    )
    reshard: bool = Field(
        default=True,
        description="with fsdp: give a layer's whole weights back after its forward; false is faster and takes more",
    )
    offload: bool = Field(default=False, description="with fsdp: keep the pieces in the CPU's memory between uses")
    timeout: float = Field(
        default=1800.0, gt=0, description="seconds that a rank waits for the others in one call before it gives up"
    )
    tensor: int = Field(default=1, ge=1, description="devices that share each layer's matrices; only 1 so far")
    context: int = Field(default=1, ge=1, description="devices that share each sequence; only 1 so far")

    @model_validator(mode="after")
    def _fits(self) -> ParallelConfig:
        for name, value in (("tensor", self.tensor), ("context", self.context)):
            if value > 1:
                raise ValueError(f"{name} is {value}: {name} parallelism is not there yet; use mode: fsdp")
        if self.mode == "replicas":
            plain = type(self).model_construct()
            for name in ("replicas", "reduce_dtype", "compute_dtype", "reshard", "offload"):
                if self.__dict__[name] != plain.__dict__[name]:
                    raise ValueError(f"{name} goes with mode: fsdp, and mode is replicas")
        return self
