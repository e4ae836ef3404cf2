"""How a process becomes one of the ranks that torch's launcher started."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from steersman.distributed.parallel import ParallelConfig
from steersman.distributed.ranks import Ranks, as_one_of, ranks
from steersman.types import SteersmanError


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def join_ranks(parallel: ParallelConfig) -> Iterator[Ranks]:
    """Joins the ranks that torch's launcher started, for as long as the block lasts; alone where none did.

    Collectives over CPU tensors go through gloo, those over CUDA tensors through NCCL. Raises SteersmanError where
    the other ranks do not come within `parallel.timeout` seconds, WaitedInVainError where they lose each other later.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield ranks()
        return
    here = meet(parallel)
    try:
        with as_one_of(here), here.waits.layers():
            yield here
    finally:
        dist.destroy_process_group()


def meet(parallel: ParallelConfig) -> Ranks:
    """Waits until all ranks have come and opens the process group of the run; which rank this is."""
    limit = timedelta(seconds=parallel.timeout)
    local, cuda = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise SteersmanError(
            f"rank {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']}: the other ranks did not come within "
            f"{parallel.timeout:g} s to {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({error})"
        ) from error
    return Ranks(rank, world, parallel, store)
