"""The recipe's `run` section, which every verb with a run folder has, and the process that it asks for."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from steersman.config.sections import Section
from steersman.distributed.launched import ranks_launched
from steersman.run.device import resolve_device, set_threads

ON_ACCELERATOR = 16_384
"""Tokens of a micro-batch on an accelerator."""


def micro_tokens(known: dict[str, Any]) -> int:
    """How many tokens go through a model at once, by the `device` that is known of the section: enough to keep an
    accelerator busy; on a CPU, few enough that activations stay below the size (32 MiB) from which every tensor is
    fresh memory from the system, page by page."""
    device = known.get("device", "auto")
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return 2_048 if on_cpu else ON_ACCELERATOR


class RunConfig(Section):
    """Where a run lives and how it is kept."""

    dir: str = Field(
        default="runs/latest", description="run folder: config, metrics, samples, checkpoints, models, report"
    )
    seed: int = Field(default=0, ge=0, description="every random stream derives from it")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(default=0, ge=0, description="CPU threads for torch; 0 leaves torch's own choice")
    deterministic: bool = Field(default=False, description="refuse operations whose result can vary between runs")
    micro_tokens: int = Field(
        default_factory=micro_tokens,
        ge=1,
        description="padded tokens that go through a model at once, 2,048 on a CPU and 16,384 on an accelerator if "
        "not given; lower it to save memory",
    )
    eval_every: int = Field(default=10, ge=1, description="steps between evaluations on held-out data")
    save_every: int = Field(default=50, ge=1, description="steps between checkpoints")
    save_async: bool = Field(
        default=False,
        description="write checkpoints on a thread while the loop goes on; costs a copy of the trained weights and "
        "moments in the CPU's memory",
    )
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept, newest first")
    keep_best: int = Field(default=1, ge=0, description="checkpoints kept, best held-out value first")
    sinks: list[str] = Field(
        default_factory=list,
        description="where else to log: tensorboard, wandb, trackio, mlflow, swanlab, my_sinks.py:Class",
    )


class ManyRunConfig(RunConfig):
    """Where a run lives and how it is kept, on one device or several."""

    devices: int = Field(
        default=1, ge=1, description="processes that share the run, each with a device of its own (or CPU cores)"
    )
    launcher: Literal["torch", "ray"] = Field(
        default="torch",
        description="what starts these processes. torch: torch's launcher, on this machine; ray: a Ray cluster "
        "that is running already, which places them (and servers that sample) on its machines and restarts them "
        "when they die",
    )

    @property
    def ranks(self) -> int:
        """The processes that share the run: `devices`, or all that a launcher has started already."""
        return max(self.devices, ranks_launched())


STEPS_ONLY = ("eval_every", "save_every", "save_async", "keep_last", "keep_best")
"""Keys of `run` that are about steps of training and their checkpoints."""
KEPT_ONLY = ("dir", "sinks", "deterministic", *STEPS_ONLY)
"""Keys of `run` that are about a run folder, or about training."""


def device_of(run: RunConfig) -> torch.device:
    """The section's device, with torch's CPU threads set as it asks."""
    set_threads(run.threads or None)
    return resolve_device(run.device)
