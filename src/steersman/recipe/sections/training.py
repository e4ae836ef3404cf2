"""What every recipe that trains a model has: its optimizer's default rate, and the devices that it can lie on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from steersman.config.sections import Section
from steersman.recipe.sections.model import ModelConfig, adapter_defaults

if TYPE_CHECKING:
    from steersman.distributed.parallel import ParallelConfig
    from steersman.run.run_config import ManyRunConfig
    from steersman.update.optimizer import OptimizerConfig

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
