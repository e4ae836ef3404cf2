"""The processes (ranks) that train one model together: what they share out, add up and agree on.

Every rank sees the small `[batch, time]` tensors of the whole batch; sampling, forwards and micro-batches are shared
out, and what each found is added up. A process that is alone is rank 0 of 1, for which all of this is the identity,
so callers have no `if`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from steersman.distributed.parallel import ParallelConfig
from steersman.distributed.waiting import NoStore, Waits
from steersman.types import SteersmanError

T = TypeVar("T")


@dataclass(slots=True)
class Ranks:
    """Rank `rank` of `world`; `parallel` says how the work is shared."""

    rank: int = 0
    world: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    store: Any = None
    group: Any = None
    """The process group of the collectives; None is that of the whole run."""
    waits: Waits = field(init=False)
    _mesh: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.waits = Waits(self.rank, self.world, self.store, "at" if self.group is None else "beside")

    @property
    def sharded(self) -> bool:
        """Whether weights lie in pieces over the ranks, so that every rank must run every layer as often as the
        others, and gradients are added up in the backward pass."""
        return self.world > 1 and self.parallel.in_pieces

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed updates the weights."""
        return self.world > 1 and self.parallel.stage > 0

    @property
    def in_step(self) -> bool:
        """Whether every rank must make as many backward passes as the others, since each adds up gradients."""
        return self.sharded or self.pieces(2) > 1

    def pieces(self, stage: int) -> int:
        """In how many pieces over the ranks lies what ZeRO cuts from this stage on (1: the optimizer's moments, 2:
        gradients), while weights are whole."""
        return self.world if stage <= self.parallel.stage < 3 else 1

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which alone owns the run folder, the log and the report."""
        return self.rank == 0

    # -- what every rank gets to know ----------------------------------------------------------------------

    def gather(self, thing: T, what: str = "results") -> list[T]:
        """Every rank's `thing`, in the order of ranks; it must be of plain types and CPU tensors."""
        if self.world == 1:
            return [thing]
        found: list[Any] = [None] * self.world
        with self.call(what):
            dist.all_gather_object(found, thing, self.group)
        return found

    def sum(self, tensor: Tensor, what: str = "a sum") -> Tensor:
        """The sum of every rank's tensor, the same bits on all; the one given is not changed."""
        if self.world == 1:
            return tensor
        total = tensor.clone()
        with self.call(what):
            dist.all_reduce(total, group=self.group)
        return total

    def largest(self, tensor: Tensor, what: str = "a maximum") -> Tensor:
        """The largest of every rank's numbers, element by element."""
        if self.world == 1:
            return tensor
        found = tensor.clone()
        with self.call(what):
            dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return found

    def from_main(self, make: Callable[[], T], what: str = "what rank 0 makes") -> T:
        """What `make` gives on rank 0, on every rank; its error is raised on every rank too.

        While it runs, `ranks()` says that rank 0 is alone: whatever would share work out does all of it itself, since
        the others wait here.
        """
        if self.world == 1:
            return make()
        made: list[Any] = [None]
        error: BaseException | None = None
        if self.main:
            with alone():
                try:
                    made = [_Made(make(), None)]
                except Exception as raised:
                    error, made = raised, [_Made(None, _portable(raised))]
        with self.call(what):
            dist.broadcast_object_list(made, src=0, group=self.group)
        if error is not None:
            raise error
        if made[0].error is not None:
            raise made[0].error
        return made[0].value

    @contextmanager
    def main_first(self, what: str = "rank 0 to go first") -> Iterator[None]:
        """Rank 0 runs the body, then the others do."""
        if not self.main:
            self.gather(None, what)
        yield
        if self.main:
            self.gather(None, what)

    def agree(self, error: Exception | None, what: str = "the end of a step") -> None:
        """Raises, on every rank, the error of the first rank that has one, with its number; none: returns."""
        if self.world == 1:
            if error is not None:
                raise error
            return
        for rank, found in enumerate(self.gather(None if error is None else _portable(error), what)):
            if found is not None:
                raise _numbered(found, rank)

    # -- gradients -----------------------------------------------------------------------------------------

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], bucket: int = 1 << 25) -> None:
        """Adds up every rank's gradients in place, in buckets of about `bucket` numbers.

        A parameter that no rank has a gradient for keeps none. Those of weights in pieces are added up already.
        """
        if self.world == 1:
            return
        if self.sharded:
            from torch.distributed.tensor import DTensor

            parameters = [p for p in parameters if not isinstance(p, DTensor)]
            if not parameters:
                return
        waiting: list[Tensor] = []
        numbers = 0
        for gradient in self.same_gradients(parameters):
            waiting.append(gradient)
            numbers += gradient.numel()
            if numbers >= bucket:
                self._sum_bucket(waiting)
                waiting, numbers = [], 0
        self._sum_bucket(waiting)

    def same_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
        """The gradients of the parameters for which any rank has one; where this rank has none it gets zeros."""
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        with self.call("the sum of gradients"):
            dist.all_reduce(has, group=self.group)
        found = []
        for parameter, count in zip(parameters, has.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                found.append(parameter.grad)
        return found

    def _sum_bucket(self, gradients: list[Tensor]) -> None:
        for dtype in dict.fromkeys(g.dtype for g in gradients):  # in the same order on every rank
            same = [g for g in gradients if g.dtype == dtype]
            flat = torch.cat([g.reshape(-1) for g in same])
            with self.call("the sum of gradients"):
                dist.all_reduce(flat, group=self.group)
            for gradient, part in zip(same, flat.split([g.numel() for g in same]), strict=True):
                gradient.copy_(part.view_as(gradient))

    # -- beside the loop -----------------------------------------------------------------------------------

    def beside(self) -> Ranks:
        """The same ranks over a process group of their own, for a thread whose calls must not mix with the loop's.

        All ranks must ask at the same time.
        """
        if self.world == 1:
            return self
        limit = timedelta(seconds=self.parallel.timeout)
        with self.call("a second process group"):
            group = dist.new_group(backend="gloo", timeout=limit)
        return Ranks(self.rank, self.world, self.parallel, self.store, group)

    def call(self, what: str) -> AbstractContextManager[None]:
        """Around one collective: noted where the others can read it, so that a time-out can name who is missing."""
        return self.waits.call(what)

    # -- weights in pieces ---------------------------------------------------------------------------------

    def mesh(self, device: str) -> Any:
        """The ranks as torch's device mesh: copies of the model over the first axis where there are several, the
        pieces of a copy over the last. It is made once; its groups have this run's time limit, not torch's half hour.

        Raises SteersmanError where the ranks do not divide into `parallel.replicas`.
        """
        if self._mesh is not None:
            return self._mesh
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        copies, limit = self.parallel.replicas, timedelta(seconds=self.parallel.timeout)
        if self.world % copies:
            raise SteersmanError(f"parallel.replicas is {copies}, which does not divide the {self.world} devices")
        with self.call("the device mesh"):
            if copies == 1:
                self._mesh = init_device_mesh(device, (self.world,), mesh_dim_names=("shard",))
                return self._mesh
            grid = torch.arange(self.world).view(copies, -1)
            groups: list[Any] = [
                next(group for members, group in axis if self.rank in members)
                for axis in (
                    [(members, dist.new_group(members, limit)) for members in rows.tolist()]
                    for rows in (grid.T, grid)
                )
            ]
            self._mesh = DeviceMesh.from_group(groups, device, grid, mesh_dim_names=("replicate", "shard"))
        return self._mesh


@dataclass(slots=True)
class _Made:
    value: Any
    error: Exception | None


def _portable(error: Exception) -> Exception:
    """The error itself where it can travel, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return SteersmanError(f"{type(error).__name__}: {error}")
    return error


def _numbered(error: Exception, rank: int) -> Exception:
    """The same kind of error, which says on which rank it was."""
    if isinstance(error, SteersmanError):
        return type(error)(f"rank {rank}: {error}")
    error.add_note(f"on rank {rank}")
    return error


_here = _alone = Ranks(store=NoStore())
_by_itself: ContextVar[bool] = ContextVar("by itself", default=False)
"""Whether this thread of rank 0 makes what the others wait for (`Ranks.from_main`)."""


def ranks() -> Ranks:
    """This process among those that train together; alone until `join_ranks` says otherwise."""
    return _alone if _by_itself.get() else _here


@contextmanager
def alone() -> Iterator[None]:
    """While open this process is alone for the calling thread: what it does there is rank 0's own work, in which the
    other ranks have no part."""
    before = _by_itself.set(True)
    try:
        yield
    finally:
        _by_itself.reset(before)


@contextmanager
def as_one_of(here: Ranks) -> Iterator[Ranks]:
    """While open this process is `here` among the ranks."""
    global _here
    before, _here = _here, here
    try:
        yield here
    finally:
        _here = before
