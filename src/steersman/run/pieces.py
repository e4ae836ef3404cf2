"""Tensors that lie in pieces over the ranks, put together and laid out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from steersman.run.ranks import ranks


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all pieces of it put together; then every rank must ask."""
    if not ranks().sharded:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine(tensor: Tensor) -> Tensor:
    """The piece that this rank holds; all of a tensor that is not in pieces."""
    if not ranks().sharded:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_pieces(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor laid out as `like` is."""
    if not ranks().sharded:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def whole_moments(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's `state_dict` with every moment put together; then every rank must ask."""
    if not ranks().sharded:
        return state
    moments = {i: {name: whole(x) for name, x in of_one.items()} for i, of_one in state["state"].items()}
    return state | {"state": moments}


def moments_in_pieces(state: dict[str, Any], order: Sequence[Any]) -> dict[str, Any]:
    """What `whole_moments` gave, laid out as the parameters are, which stand in `order`."""
    if not ranks().sharded:
        return state
    moments = {
        i: {name: in_pieces(x, order[i]) if x.ndim else x for name, x in of_one.items()}
        for i, of_one in state["state"].items()
    }
    return state | {"state": moments}
