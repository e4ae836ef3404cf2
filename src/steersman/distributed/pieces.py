"""Tensors that lie in pieces over the ranks, put together and laid out again, whichever engine has cut them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.distributed import zero_pieces
from steersman.distributed.ranks import ranks
from steersman.distributed.stored import StoredTensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all pieces of it put together; then every rank must ask."""
    if not ranks().sharded:
        return tensor
    if _cut_by_deepspeed(tensor):
        return zero_pieces.whole(tensor)
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: Any) -> torch.Size:
    """The shape that all of the tensor has."""
    return tensor.ds_shape if _cut_by_deepspeed(tensor) else tensor.shape


def local_shard(tensor: Any) -> Tensor:
    """The piece that this rank holds, DeepSpeed's flat and padded; all of a tensor that is not in pieces."""
    if not ranks().sharded:
        return tensor
    if _cut_by_deepspeed(tensor):
        return tensor.ds_tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def named_shard(tensor: Tensor) -> tuple[Tensor, str]:
    """The piece that this rank holds, and which it is, such as " piece 1"; all of a tensor that is not in pieces, and
    ""."""
    if not ranks().sharded:
        return tensor, ""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor, ""
    at = zip(tensor.device_mesh.get_coordinate() or (), tensor.placements, strict=True)
    return tensor.to_local(), "".join(f" piece {place}" for place, kind in at if kind.is_shard())


def shard_like(tensor: Tensor | StoredTensor, like: Any) -> Tensor:
    """A whole tensor, or one that a checkpoint holds, laid out as `like` is."""
    if isinstance(tensor, StoredTensor):
        return tensor.read(like)
    if not ranks().sharded:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def kept_tensor(tensor: Tensor) -> Tensor:
    """What a checkpoint keeps of a parameter: FSDP2's piece, else all of it. DeepSpeed's is put together in the CPU's
    memory, so every rank must ask."""
    return full_tensor(tensor).cpu() if _cut_by_deepspeed(tensor) else tensor.detach()


def read_whole(saved: Tensor | StoredTensor) -> Tensor:
    """All of a tensor, or of one that a checkpoint holds; every rank must ask."""
    return saved.full_tensor() if isinstance(saved, StoredTensor) else full_tensor(saved)


@torch.no_grad()
def put_into(parameter: Any, saved: Tensor | StoredTensor) -> None:
    """Gives a parameter the numbers of another, or of what a checkpoint holds, whichever way each is laid; all ranks
    call it."""
    if not _cut_by_deepspeed(parameter):
        parameter.copy_(shard_like(saved, parameter))
        return
    zero_pieces.write(parameter, read_whole(saved))


def _cut_by_deepspeed(tensor: Tensor) -> bool:
    return ranks().sharded and ranks().parallel.stage == 3 and zero_pieces.is_cut(tensor)


def shard_moments(state: dict[str, Any], order: Sequence[Any]) -> dict[str, Any]:
    """An optimiser's saved `state_dict` laid out as the parameters are, which stand in `order`."""

    def laid(x: Any, like: Any) -> Any:
        return shard_like(x, like) if isinstance(x, StoredTensor) or (isinstance(x, Tensor) and x.ndim) else x

    moments = {i: {name: laid(x, order[i]) for name, x in of_one.items()} for i, of_one in state["state"].items()}
    return state | {"state": moments}


def copy_to_cpu(state: Any) -> Any:
    """The nested state with every tensor copied to the CPU, those in pieces piece by piece."""
    if isinstance(state, dict):
        return {key: copy_to_cpu(inner) for key, inner in state.items()}
    if isinstance(state, list | tuple):
        return [copy_to_cpu(inner) for inner in state]
    return state.detach().to("cpu", copy=True) if isinstance(state, Tensor) else state
