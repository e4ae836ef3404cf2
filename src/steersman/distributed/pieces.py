"""Tensors that lie in pieces over the ranks, put together and laid out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from steersman.distributed.ranks import ranks
from steersman.distributed.stored import StoredTensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all pieces of it put together; then every rank must ask."""
    if not ranks().sharded:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """The piece that this rank holds; all of a tensor that is not in pieces."""
    if not ranks().sharded:
        return tensor
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
    return state.detach().cpu().clone() if isinstance(state, Tensor) else state
