"""What a method gives back, looked at where it comes in: a wrong shape would be broadcast, in silence."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.types import SteersmanError, Trajectory
from steersman.update.optimizer import NotFiniteError


def advantage_of(algorithm: Algorithm, traj: Trajectory, *, finite: bool = True) -> Advantage:
    """The method's advantage.

    Raises SteersmanError where it is no `Advantage` of floating tensors `[B, T]`, and with `finite` NotFiniteError
    for a step that counts whose advantage or target is no finite number.
    """
    found: Any = algorithm.advantage(traj)
    who = f"{type(algorithm).__qualname__}.advantage"
    if not isinstance(found, Advantage):
        raise SteersmanError(f"{who} gave {_kind(found)}; give steersman.advantage.gae.Advantage(adv, ret)")
    _require_steps(who, "adv", found.adv, traj.mask.shape)
    if algorithm.critic or found.ret is not None:
        _require_steps(who, "ret, what the critic regresses to,", found.ret, traj.mask.shape)
    for name, steps in (("advantage", found.adv), ("target of the critic", found.ret)) if finite else ():
        wrong = () if steps is None else (traj.mask & ~steps.isfinite()).nonzero().tolist()
        if steps is not None and wrong:
            b, t = wrong[0]
            raise NotFiniteError(f"{who}: the {name} of row {b}, step {t} is {float(steps[b, t]):g}")
    return found


def loss_of(
    algorithm: Algorithm, logp: Float[Tensor, "B T"], traj: Trajectory, adv: Float[Tensor, "B T"], coef: Coefficients
) -> Float[Tensor, "B T"]:
    """The method's loss of each step.

    Raises SteersmanError where it is no floating tensor `[B, T]`, or has no gradient by `logp` where that has one.
    """
    found, who = algorithm.loss(logp, traj, adv, coef), f"{type(algorithm).__qualname__}.loss"
    _require_steps(who, "the loss", found, logp.shape)
    if torch.is_grad_enabled() and logp.requires_grad and not found.requires_grad:
        raise SteersmanError(
            f"{who} gave a loss without a gradient, so nothing would be learned; compute it from the `logp` that it "
            "is given, and without detach() or no_grad()"
        )
    return found


def _require_steps(who: str, what: str, found: Any, shape: torch.Size) -> None:
    wanted = f"a floating tensor of shape [B, T] = {list(shape)} is expected"
    if not isinstance(found, Tensor) or found.shape != shape:
        raise SteersmanError(f"{who}: {what} is {_kind(found)}; {wanted}, one number for each step, not reduced")
    if not found.is_floating_point():
        raise SteersmanError(f"{who}: {what} is a tensor of {found.dtype}; {wanted}")


def _kind(found: Any) -> str:
    return f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
