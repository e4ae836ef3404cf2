"""The trust-region update: natural gradient by conjugate gradient, then a line search.

Source: TRPO, arXiv 1502.05477, section 6 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from steersman.distributed.ranks import ranks
from steersman.ops.conjugate_gradient import conjugate_gradient
from steersman.types import Stats

Scalar = Callable[[], Tensor]


def trust_region_step(
    parameters: Sequence[nn.Parameter],
    surrogate: Sequence[Scalar],
    kl: Sequence[Scalar],
    *,
    max_kl: float,
    cg_steps: int = 10,
    damping: float = 0.1,
    backtracks: int = 10,
    backtrack_ratio: float = 0.8,
) -> Stats:
    """One step that lowers the surrogate loss inside the ball mean KL(old || new) <= max_kl.

    `surrogate` and `kl` are given in parts (one per micro-batch) that add up to the mean over the batch; each is
    called anew at the parameters of the moment, and `kl` must be twice differentiable; each rank gives its own. The
    direction solves
    (F + damping) x = -g with Fisher-vector products, F being the Hessian of the mean KL at the old parameters;
    its length is sqrt(2 max_kl / x'(F + damping)x); the line search shrinks it until the KL is inside the ball
    and the loss has fallen, or leaves the parameters as they were.

    Returns `trpo/kl`, `trpo/improvement`, `trpo/step` (share of the full step taken; 0: none) and `grad_norm`.
    """
    start = parameters_to_vector(parameters).detach().clone()
    loss_old, gradient = _total_and_gradient(surrogate, parameters)

    def product(v: Tensor) -> Tensor:
        mine = sum((_hessian_vector(part, parameters, v) for part in kl), torch.zeros_like(v))
        return ranks().sum(mine, "a Fisher-vector product") + damping * v

    direction = conjugate_gradient(product, -gradient, cg_steps)
    curvature = float(direction @ product(direction))
    stats = {"grad_norm": float(gradient.norm()), "trpo/kl": 0.0, "trpo/improvement": 0.0, "trpo/step": 0.0}
    if not math.isfinite(curvature) or curvature <= 0:
        return stats
    full = direction * math.sqrt(2 * max_kl / curvature)
    for k in range(backtracks):
        share = backtrack_ratio**k
        vector_to_parameters(start + share * full, parameters)
        with torch.no_grad():
            improvement, distance = loss_old - _total(surrogate), _total(kl)
        if improvement > 0 and distance <= max_kl:
            return stats | {"trpo/kl": distance, "trpo/improvement": improvement, "trpo/step": share}
    vector_to_parameters(start, parameters)
    return stats


def _total_and_gradient(parts: Sequence[Scalar], parameters: Sequence[nn.Parameter]) -> tuple[float, Tensor]:
    total, gradient = 0.0, torch.zeros_like(parameters_to_vector(parameters)).detach()
    for part in parts:
        value = part()
        gradient += _flat(torch.autograd.grad(value, parameters, allow_unused=True), parameters)
        total += float(value.detach())
    here = ranks()
    return sum(here.gather(total, "the surrogate")), here.sum(gradient, "the surrogate's gradient")


def _total(parts: Sequence[Scalar]) -> float:
    """The sum over every rank's parts."""
    return sum(ranks().gather(sum(float(part()) for part in parts), "a line search"))


def _hessian_vector(part: Scalar, parameters: Sequence[nn.Parameter], v: Tensor) -> Tensor:
    first = torch.autograd.grad(part(), parameters, create_graph=True, allow_unused=True)
    pairs = zip(first, _split(v, parameters), strict=True)
    along = torch.stack([(g * piece).sum() for g, piece in pairs if g is not None]).sum()
    return _flat(torch.autograd.grad(along, parameters, allow_unused=True), parameters)


def _split(v: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    pieces = v.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    filled = [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([g.reshape(-1) for g in filled])
