"""Outputs that a backward pass computes again from what their operation keeps, where else they would be kept too.

What a norm or a gate gives is kept by the linear layers that read it, for their weights' gradients, though it follows
in one pass from what the norm or the gate keeps for its own. Linear layers ask here for the operation that made what
they read, keep that instead, and have it compute its output once more when they need it. The idea is selective
recomputation (arXiv 2205.05198, section 5); there it is done to attention, here to norms and gates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

Node = Any
"""The context of a call of a `torch.autograd.Function`, which is also the `grad_fn` of what it returned."""

_outputs: dict[type, Callable[..., Tensor]] = {}


def recomputable(operation: type[Function], output: Callable[..., Tensor]) -> None:
    """Makes known that `output(node, *saved)` gives again, bit for bit, the one tensor that `operation` returned.

    Its forward calls `keep`, its backward `take`.
    """
    _outputs[operation._backward_cls] = output  # type: ignore[attr-defined]


def keep(node: Node, *tensors: Tensor) -> None:
    """Saves what the operation needs for its gradient and for its output."""
    node.save_for_backward(*tensors)
    node.unpacked = node.output = None


def take(node: Node) -> tuple[Tensor, ...]:
    """What `keep` saved, in the operation's own backward; its output, if it was computed again, is let go."""
    saved = _unpacked(node)
    node.unpacked = node.output = None
    return saved


def maker(x: Tensor) -> Node | None:
    """The call whose unchanged output `x` is, or views row by row, if it can compute it again."""
    node = _whole(x).grad_fn
    return node if type(node) in _outputs and x._version == 0 else None


def _whole(x: Tensor) -> Tensor:
    """What `x` is a view of, if both have the same rows in the same order, as where a batch was flattened."""
    base = x._base
    if base is None or x.shape[-1:] != base.shape[-1:] or x.numel() != base.numel():
        return x
    return base if x.is_contiguous() and base.is_contiguous() else x


def output(node: Node) -> Tensor:
    """The output of `maker`'s call, computed again once for all who read it, and kept until its own backward."""
    if node.output is None:
        node.output = _outputs[type(node)](node, *_unpacked(node))
    return node.output


def _unpacked(node: Node) -> tuple[Tensor, ...]:
    """Unpacked once, since gradient checkpointing hands out each saved tensor a single time."""
    if node.unpacked is None:
        node.unpacked = node.saved_tensors
    return node.unpacked
