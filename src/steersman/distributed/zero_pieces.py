"""Weights in pieces by DeepSpeed's ZeRO 3: cut over the ranks, put together for a while, read and written whole.

A parameter that is cut keeps its place in its module, but holds no numbers until it is put together; its piece lies
beside it, flat and padded to the same size on every rank.

Source: `deepspeed.zero.Init` and its parameters' own methods, DeepSpeed 0.19.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steersman.distributed.ranks import ranks


def deepspeed_on(device: torch.device) -> Any:
    """The module `deepspeed` for models on this kind of device."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    found: Any = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        found.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled now
    return found


def cut(module: nn.Module) -> None:
    """Cuts a module's parameters over the ranks, in place; all get rank 0's numbers. Those that are cut stay so."""
    deepspeed = deepspeed_on(next(module.parameters()).device)
    with ranks().call("the start of weights in pieces"):
        # Without its own linear layers, which would be put into torch for the whole process. Its dtype changes
        # nothing in a module that is there already.
        deepspeed.zero.Init(module=module, mem_efficient_linear=False, dtype=torch.float32)


def is_cut(tensor: Tensor) -> bool:
    """Whether it is a parameter that `cut` has cut; it may be put together now."""
    return importlib.import_module("deepspeed.runtime.zero.partition_parameters").is_zero_param(tensor)


def put_together(parameters: Sequence[Any]) -> None:
    """Gives parameters that were cut all their numbers on every rank; all ranks ask, for the same ones in the same
    order."""
    apart = [p for p in parameters if not _together(p)]
    if apart:
        with ranks().call("the weights of a layer"):
            apart[0].all_gather(apart)


def take_apart(parameters: Sequence[Any]) -> None:
    """Gives back what `put_together` took; what was changed meanwhile is lost."""
    together = [p for p in parameters if _together(p)]
    if together:
        together[0].partition(together)


def whole(parameter: Any) -> Tensor:
    """A copy of all of a parameter's numbers; all ranks ask."""
    if _together(parameter):
        return parameter.detach().clone()
    put_together([parameter])
    found = parameter.detach().clone()
    take_apart([parameter])
    return found


def write(parameter: Any, numbers: Tensor) -> None:
    """Gives this rank's piece of a parameter the numbers, which are the whole's."""
    piece = parameter.ds_tensor
    piece.copy_(piece_of(numbers, len(piece)).to(piece.dtype))


def piece_of(numbers: Tensor, size: int) -> Tensor:
    """This rank's piece of a whole, `size` numbers long, with zeros where the whole has ended, where the whole is."""
    flat, start = numbers.detach().flatten(), ranks().rank * size
    mine = flat[start : start + size]
    return nn.functional.pad(mine, (0, size - len(mine)))


def _together(parameter: Any) -> bool:
    return parameter.ds_status.name == "AVAILABLE"
