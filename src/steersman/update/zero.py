"""DeepSpeed's ZeRO, stages 1 and 2: whole weights on every rank, the optimizer's moments in pieces over the ranks,
and in stage 2 the gradients too.

The loops call `backward` on losses of their own making, so DeepSpeed gets the bare parameters and no `forward`: in
stage 2 a backward pass that reaches one of them is closed by DeepSpeed's reduction. Losses carry the whole batch's
denominator, so gradients are added up, not averaged.

Source: arXiv 1910.02054, section 5; DeepSpeed 0.19.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steersman.distributed.pieces import shard_like
from steersman.distributed.ranks import ranks
from steersman.types import SteersmanError

BUCKET = 50_000_000
"""Numbers that are reduced or gathered at once, where the file says nothing; DeepSpeed's 500 million take 2 GB."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """DeepSpeed around the AdamW `adamw`, which has the parameters `parameters`.

    Raises SteersmanError for weights that are trained in another precision than float32.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], adamw: Any, max_grad_norm: float) -> None:
        here = ranks()
        other = next((p.dtype for p in parameters if p.dtype != torch.float32), None)
        if other is not None or type(adamw) is not torch.optim.AdamW:
            raise SteersmanError(
                f"parallel.mode {here.parallel.mode} updates float32 weights with adamw, and these are "
                f"{other or torch.float32} with {type(adamw).__name__}; use model.dtype: float32 and optimizer.kind: "
                "adamw, or parallel.mode: fsdp or replicas"
            )
        self.parameters, self.stage = parameters, here.parallel.stage
        self.groups: list[dict[str, Any]] = adamw.state_dict()["param_groups"]
        order = (p for group in adamw.param_groups for p in group["params"])
        self.places = {parameter: place for place, parameter in enumerate(order)}
        self.adamw = adamw
        self.engine = _started(parameters, adamw, max_grad_norm)
        self._in_backward = False
        if self.stage == 2:
            for parameter in parameters:
                parameter.register_hook(self._reached)

    def _reached(self, _gradient: Tensor) -> None:
        """A backward pass has come to a parameter: once it is over, what it left is reduced."""
        if not self._in_backward:
            self._in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._reduce)

    def _reduce(self) -> None:
        self._in_backward = False
        with ranks().call("the sum of gradients"):
            self.engine.allreduce_gradients()

    def step(self) -> float:
        self.engine.optimizer.refresh_fp32_params()  # weights that were put back in place are its own, too
        if self.stage == 1:
            ranks().same_gradients(self.parameters)
        with ranks().call("an update by DeepSpeed"):
            self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def zero_grad(self) -> None:
        zero = self.engine.optimizer
        zero.zero_grad(set_to_none=True)
        for place in range(len(zero.bit16_groups)):
            zero.averaged_gradients[place] = zero.all_grad_tensors[place] = None

    def state_dict(self) -> dict[str, Any]:
        """As the plain AdamW's, every moment whole, on the CPU."""
        found: dict[int, dict[str, Tensor]] = {}
        for group, (flat, laid) in enumerate(self._flat()):
            kept = self.adamw.state.get(flat, {})
            for name in (name for name in MOMENTS if name in kept):
                whole = self._whole(kept[name], f"the moments of group {group}")
                for parameter, start in laid:
                    one = whole[start : start + parameter.numel()].view(parameter.shape).clone()
                    found.setdefault(self.places[parameter], {"step": kept["step"].cpu().clone()})[name] = one
        rates = {"lr": self.adamw.param_groups[0]["lr"]}
        return {"state": dict(sorted(found.items())), "param_groups": [group | rates for group in self.groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state["state"]
        for flat, laid in self._flat():
            steps = [saved[self.places[p]]["step"] for p, _ in laid if self.places[p] in saved]
            if not steps:
                self.adamw.state.pop(flat, None)
                continue
            kept = {"step": torch.as_tensor(steps[0], dtype=torch.float32).to(flat.device, copy=True)}
            for name in MOMENTS:
                kept[name] = torch.zeros_like(flat, requires_grad=False)
                for parameter, start in laid:
                    if (place := self.places[parameter]) in saved:
                        whole = shard_like(saved[place][name], parameter)
                        _put(kept[name], whole.detach().flatten(), start - ranks().rank * flat.numel())
            self.adamw.state[flat] = kept

    def _flat(self) -> Iterator[tuple[Tensor, list[tuple[nn.Parameter, int]]]]:
        """Of each group this rank's piece of the weights, which are laid one after the other and cut into as many
        equal pieces as there are ranks, and where in the whole each parameter begins."""
        zero = self.engine.optimizer
        for group, flat in enumerate(zero.single_partition_of_fp32_groups):
            laid = zip(zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group], strict=True)
            yield flat, list(laid)

    def _whole(self, piece: Tensor, what: str) -> Tensor:
        pieces = [torch.empty_like(piece) for _ in range(ranks().world)]
        with ranks().call(what):
            dist.all_gather(pieces, piece)
        return torch.cat([part.cpu() for part in pieces])


def _put(piece: Tensor, whole: Tensor, start: int) -> None:
    """Copies into a piece what of `whole` falls into it, where `whole` begins at `start` of the piece."""
    first, last = max(start, 0), min(start + len(whole), len(piece))
    if first < last:
        piece[first:last] = whole[first - start : last - start]


def _started(parameters: Sequence[nn.Parameter], adamw: Any, max_grad_norm: float) -> Any:
    """DeepSpeed's engine over the bare parameters; its groups have this run's time limit, not half an hour."""
    os.environ.setdefault("DS_ACCELERATOR", parameters[0].device.type)
    deepspeed: Any = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if parameters[0].device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled now
    here = ranks()
    asked = here.parallel.deepspeed_settings(max_grad_norm)
    zero = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, **asked.pop("zero_optimization", {})}
    settings = {
        "steps_per_print": 1 << 40,
        **asked,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "sum",
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero | {"stage": here.parallel.stage},
    }
    with here.call("the start of DeepSpeed"):
        engine = deepspeed.initialize(
            model=nn.ParameterList(parameters), optimizer=adamw, config=settings, dist_init_required=False
        )[0]
    limit = timedelta(seconds=here.parallel.timeout)
    for group in (engine.data_parallel_group, engine.seq_data_parallel_group):
        dist.distributed_c10d._set_pg_timeout(limit, group)
    return engine
