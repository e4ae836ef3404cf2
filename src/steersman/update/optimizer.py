"""One role's optimiser: its kind, a schedule, gradient clipping, and a stop at the first number that is not one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from steersman.config.sections import Section
from steersman.distributed.pieces import whole_shape
from steersman.distributed.ranks import ranks
from steersman.ops.heap import freed
from steersman.types import Stats, SteersmanError
from steersman.update.engines import engine_of
from steersman.update.kinds import Kind, Rounding, steps_of


class OptimizerConfig(Section):
    """How one model's weights are updated."""

    kind: Kind = Field(
        default="adamw",
        description="adamw; adamw-8bit (2 bytes of moments per weight, not 8); adamw-8bit-paged (the same, in "
        "memory that spills to the host); adafactor (moments of rows and columns); lion, lion-8bit (one moment; at "
        "a third of AdamW's rate); muon (matrices; embeddings, output layer, adapters and vectors by AdamW)",
    )
    rounding: Rounding = Field(
        default="master",
        description="how updates of half-precision weights are kept: master (a float32 copy), kahan (a remainder in "
        "the weights' precision), stochastic (at random, right in the mean), nearest (small ones are lost)",
    )
    lr: float = Field(
        default=1e-4, gt=0, description="peak learning rate; 5e-4 if a recipe that trains adapters gives none"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="the rate after warm-up. constant: lr; linear: falls in a straight line to min_lr; cosine: "
        "falls to min_lr by a half cosine",
    )
    warmup: float = Field(
        default=0.0,
        ge=0,
        description="updates over which the rate rises to lr; below 1 it is a share of all updates; rounded up",
    )
    min_lr: float = Field(default=0.0, ge=0, le=1, description="where a schedule ends, as a share of lr")
    weight_decay: float = Field(
        default=0.0, ge=0, description="decoupled weight decay, on matrices only, which stacked biases are not"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="first-moment decay; Muon's momentum")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="second-moment decay")
    eps: float = Field(default=1e-8, gt=0, description="AdamW epsilon")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this global norm")


class Optimizer:
    """AdamW or another kind over the parameters that require gradients, with its schedule; all of it in `state_dict`.

    `total` is the number of updates that the schedule spans. `tables` are the embeddings, output layers and adapters
    among the parameters, which `muon` leaves to AdamW. `vectors` are no matrices whatever their shape: it leaves them
    too, and they do not decay.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimizerConfig,
        total: int,
        tables: Iterable[nn.Parameter] = (),
        *,
        vectors: Iterable[nn.Parameter] = (),
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise SteersmanError("nothing to train: no parameter requires a gradient")
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters)
        if ranks().sharded and (config.kind != "adamw" or (half and config.rounding != "nearest")):
            raise SteersmanError(
                f"optimizer: parallel.mode {ranks().parallel.mode} updates its pieces with plain adamw; use kind: "
                "adamw with weights in float32 (in mode fsdp, compute_dtype: bfloat16 computes in half of it), or "
                "parallel.mode: replicas"
            )
        self.config, self.total, self.updates = config, max(total, 1), 0
        self.warmup = warmup_updates(config.warmup, self.total)
        vectors = list(vectors)
        stacked = {id(p) for p in vectors}
        matrices = {id(p) for p in self.parameters if len(whole_shape(p)) >= 2} - stacked
        groups = [
            {"params": [p for p in self.parameters if id(p) in matrices], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if id(p) not in matrices], "weight_decay": 0.0},
        ]
        self.adamw = steps_of(groups, config, [*tables, *vectors])  # or another kind
        self.gradient_bytes = sum(p.nbytes for p in self.parameters if p.is_cpu)
        self.engine = engine_of(self.parameters, self.adamw, config.max_grad_norm)

    def rate(self) -> float:
        """Learning rate of the next update: never above `lr`.

        It rises linearly to `lr` over the updates of the warm-up, is `lr` at the first update after it, and then
        follows the schedule.
        """
        config = self.config
        if self.updates < self.warmup:
            return config.lr * (self.updates + 1) / self.warmup
        done = min((self.updates - self.warmup) / max(self.total - self.warmup, 1), 1.0)
        if config.schedule == "linear":
            share = 1 - done
        elif config.schedule == "cosine":
            share = (1 + math.cos(math.pi * done)) / 2
        else:
            return config.lr
        return config.lr * (config.min_lr + (1 - config.min_lr) * share)

    def step(self) -> Stats:
        """Add up the ranks' gradients, clip, update and clear them; returns `lr` and `grad_norm` (before clipping).

        Raises `NotFiniteError` before anything is changed when the gradient is NaN or infinite.
        """
        lr = self.rate()
        for group in self.adamw.param_groups:
            group["lr"] = lr
        norm = self.engine.step()
        self.zero_grad()
        freed(self.gradient_bytes)
        if not math.isfinite(norm):
            raise NotFiniteError(f"the gradient norm is {norm} at update {self.updates}")
        self.updates += 1
        return {"lr": lr, "grad_norm": norm}

    def zero_grad(self) -> None:
        self.engine.zero_grad()

    def state_dict(self) -> dict:
        return {"adamw": self.engine.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.engine.load_state_dict(state["adamw"])
        self.updates = state["updates"]


def warmup_updates(warmup: float, total: int) -> int:
    """How many updates the warm-up has: `warmup` itself, or below 1 that share of `total`, rounded up."""
    updates = warmup if warmup >= 1 else warmup * total
    return math.ceil(round(updates, 6))  # 0.1 * 30 is a little above 3 in floating point


class NotFiniteError(SteersmanError):
    """A loss, gradient or weight became NaN or infinite; nothing was updated with it."""


def not_finite(losses: Sequence[dict[str, Tensor]]) -> NotFiniteError | None:
    """The error for the first loss, by its name, that is no finite number; it is asked once an update, so that
    nothing waits for the device in between."""
    named = [(name, loss) for parts in losses for name, loss in parts.items()]
    if not named or bool(torch.stack([loss.double() for _, loss in named]).isfinite().all()):
        return None
    name, loss = next((name, loss) for name, loss in named if not loss.isfinite())
    return NotFiniteError(f"the loss is not a finite number ({name}: {loss.item():g})")
