"""DeepSpeed's ZeRO: the optimizer's moments in pieces over the ranks, from stage 2 on the gradients too, and in stage
3 the weights, which `model.zero_layers` puts together where they are read.

The loops call `backward` on losses of their own making, so DeepSpeed gets the bare parameters and no `forward`: from
stage 2 on a backward pass that reaches one of them is closed by DeepSpeed's reduction. Losses carry the whole batch's
denominator, so gradients are added up, not averaged.

Source: arXiv 1910.02054, section 5; DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steersman.distributed.pieces import read_whole, whole_shape
from steersman.distributed.ranks import ranks
from steersman.distributed.zero_pieces import deepspeed_on, piece_of
from steersman.types import SteersmanError

BUCKET = 50_000_000
"""Numbers that are reduced or gathered at once, where the file says nothing; DeepSpeed's 500 million take 2 GB."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True, frozen=True)
class Laid:
    """A parameter in a group that is laid flat: where it begins, in the whole group that is cut into equal pieces
    (stages 1 and 2), or in every rank's piece, which then has `size` numbers of it (stage 3)."""

    parameter: nn.Parameter
    start: int
    size: int | None = None

    def out_of(self, pieces: Sequence[Tensor]) -> Tensor:
        """The parameter's numbers, flat, out of all ranks' pieces of its group."""
        numbers = whole_shape(self.parameter).numel()
        if self.size is None:
            return torch.cat(list(pieces))[self.start : self.start + numbers]
        return torch.cat([piece[self.start : self.start + self.size] for piece in pieces])[:numbers]

    def put_into(self, piece: Tensor, whole: Tensor) -> None:
        """Copies into this rank's piece what of the parameter's `whole` falls into it."""
        if self.size is None:
            _put(piece, whole.flatten(), self.start - ranks().rank * len(piece))
        else:
            piece[self.start : self.start + self.size] = piece_of(whole, self.size)


class ZeroEngine:
    """DeepSpeed around the AdamW `adamw`, which has the parameters `parameters`; a subclass for each way in which it
    lays what it updates.

    Raises SteersmanError for weights that are trained in another precision than float32, and where weights are
    whole, for single numbers.
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
        if self.stage < 3 and any(not p.ndim for p in parameters):
            raise SteersmanError(
                f"parallel.mode {here.parallel.mode}: the model trains a parameter that is a single number, which "
                "DeepSpeed does not send to the other ranks; use parallel.mode: replicas"
            )
        self.groups: list[dict[str, Any]] = adamw.state_dict()["param_groups"]
        order = (p for group in adamw.param_groups for p in group["params"])
        self.places = {parameter: place for place, parameter in enumerate(order)}
        self.adamw = adamw
        self.engine = _started(parameters, adamw, max_grad_norm)
        self._in_backward = False
        if self.stage > 1:
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
        self._before_step()
        with ranks().call("an update by DeepSpeed"):
            self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def zero_grad(self) -> None:
        raise NotImplementedError

    def _before_step(self) -> None:
        """Makes of the gradients what DeepSpeed's step takes."""
        raise NotImplementedError

    def _flat(self) -> Iterator[tuple[Tensor, list[Laid]]]:
        """Of each group this rank's flat piece of the weights, and how the parameters lie in it."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As the plain AdamW's, every moment whole, on the CPU."""
        found: dict[int, dict[str, Tensor]] = {}
        for group, (flat, laid) in enumerate(self._flat()):
            kept = self.adamw.state.get(flat, {})
            for name in (name for name in MOMENTS if name in kept):
                pieces = self._pieces(kept[name], f"the moments of group {group}")
                for one in laid:
                    moment = one.out_of(pieces).view(whole_shape(one.parameter)).clone()
                    found.setdefault(self.places[one.parameter], {"step": kept["step"].cpu().clone()})[name] = moment
        rates = {"lr": self.adamw.param_groups[0]["lr"]}
        return {"state": dict(sorted(found.items())), "param_groups": [group | rates for group in self.groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state["state"]
        for flat, laid in self._flat():
            steps = [saved[place]["step"] for one in laid if (place := self.places[one.parameter]) in saved]
            if not steps:
                self.adamw.state.pop(flat, None)
                continue
            kept = {"step": torch.as_tensor(steps[0], dtype=torch.float32).to(flat.device, copy=True)}
            for name in MOMENTS:
                kept[name] = torch.zeros_like(flat, requires_grad=False)
                for one in laid:
                    if (place := self.places[one.parameter]) in saved:
                        one.put_into(kept[name], read_whole(saved[place][name]).to(flat.device))
            self.adamw.state[flat] = kept

    def _pieces(self, piece: Tensor, what: str) -> list[Tensor]:
        """Every rank's piece, on the CPU."""
        pieces = [torch.empty_like(piece) for _ in range(ranks().world)]
        with ranks().call(what):
            dist.all_gather(pieces, piece)
        return [part.cpu() for part in pieces]


class ZeroWholeWeights(ZeroEngine):
    """Stages 1 and 2: the weights are whole. A group's are laid one after the other and cut into as many equal pieces
    as there are ranks."""

    def zero_grad(self) -> None:
        zero = self.engine.optimizer
        zero.zero_grad(set_to_none=True)
        for place in range(len(zero.bit16_groups)):
            zero.averaged_gradients[place] = zero.all_grad_tensors[place] = None

    def _before_step(self) -> None:
        if self.stage == 1:
            ranks().same_gradients(self.parameters)

    def _flat(self) -> Iterator[tuple[Tensor, list[Laid]]]:
        zero = self.engine.optimizer
        for group, flat in enumerate(zero.single_partition_of_fp32_groups):
            laid = zip(zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group], strict=True)
            yield flat, [Laid(parameter, start) for parameter, start in laid]


class ZeroCutWeights(ZeroEngine):
    """Stage 3: every parameter is cut by itself, and a rank has a group's pieces one after the other.

    Departure: DeepSpeed averages the ranks' gradients there, and the first micro-batch's take the place of what it
    had; here all are added up.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], adamw: Any, max_grad_norm: float) -> None:
        super().__init__(parameters, adamw, max_grad_norm)
        self.zero_grad()

    def zero_grad(self) -> None:
        zero = self.engine.optimizer
        zero.zero_grad(set_to_none=True)
        zero.grad_partitions_flat_buffer.zero_()
        zero.micro_step_id = 1  # adds to what is there

    def _before_step(self) -> None:
        self.engine.optimizer.grad_partitions_flat_buffer.mul_(ranks().world)

    def _flat(self) -> Iterator[tuple[Tensor, list[Laid]]]:
        zero = self.engine.optimizer
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            laid, start = [], 0
            for parameter in group:
                laid.append(Laid(parameter, start, parameter.partition_numel()))
                start += parameter.partition_numel()
            yield flat, laid


def _put(piece: Tensor, whole: Tensor, start: int) -> None:
    """Copies into a piece what of `whole` falls into it, where `whole` begins at `start` of the piece."""
    first, last = max(start, 0), min(start + len(whole), len(piece))
    if first < last:
        piece[first:last] = whole[first - start : last - start]


def _started(parameters: Sequence[nn.Parameter], adamw: Any, max_grad_norm: float) -> Any:
    """DeepSpeed's engine over the bare parameters; its groups have this run's time limit, not half an hour."""
    deepspeed = deepspeed_on(parameters[0].device)
    here = ranks()
    asked = here.parallel.deepspeed_settings({})  # the recipe has held its clip to every optimizer's
    zero = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, **asked.pop("zero_optimization", {})}
    if here.parallel.stage == 3:  # `zero_layers` says what is whole when, and `ZeroCutWeights` what is added up
        zero |= {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    settings = {
        "steps_per_print": 1 << 40,
        **asked,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "sum" if here.parallel.stage < 3 else "mean",
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
