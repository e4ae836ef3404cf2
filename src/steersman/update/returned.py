"""What a method gives back, looked at where it comes in: a wrong shape would be broadcast, in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.guards.raised import user_errors
from steersman.types import SteersmanError, Trajectory
from steersman.update.optimizer import NotFiniteError


def advantage_of(algorithm: Algorithm, traj: Trajectory, *, finite: bool = True) -> Advantage:
    """The method's advantage.

    Raises SteersmanError where it is no `Advantage` of floating tensors `[B, T]`, and with `finite` NotFiniteError
    for a step that counts whose advantage or target is no finite number.
    """
    who = f"{type(algorithm).__qualname__}.advantage"
    with _asked(algorithm, who, traj):
        found: Any = algorithm.advantage(traj)
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
    who = f"{type(algorithm).__qualname__}.loss"
    with _asked(algorithm, who, traj):
        found = algorithm.loss(logp, traj, adv, coef)
    _require_steps(who, "the loss", found, logp.shape)
    if torch.is_grad_enabled() and logp.requires_grad and not found.requires_grad:
        raise SteersmanError(
            f"{who} gave a loss without a gradient, so nothing would be learned; compute it from the `logp` that it "
            "is given, and without detach() or no_grad()"
        )
    return found


def clip_of(
    algorithm: Algorithm, logp: Float[Tensor, "B T"], traj: Trajectory
) -> tuple[tuple[float, float], Float[Tensor, "B T"]] | None:
    """The bounds of the method's clip and the logarithm of the ratio that they are of; None without a clip.

    Raises SteersmanError where the bounds are no two numbers, or the ratio is no floating tensor `[B, T]`.
    """
    name = type(algorithm).__qualname__
    with _asked(algorithm, f"{name}.clip_range", traj):
        bounds: Any = algorithm.clip_range()
    if bounds is None:
        return None
    if not isinstance(bounds, tuple) or [isinstance(x, int | float) for x in bounds] != [True, True]:
        raise SteersmanError(f"{name}.clip_range gave {bounds!r}; give (below, above), two numbers, or None")
    below, above = bounds
    with _asked(algorithm, f"{name}.log_ratio", traj):
        ratio = algorithm.log_ratio(logp, traj)
    _require_steps(f"{name}.log_ratio", "the logarithm of the ratio", ratio, logp.shape)
    return (below, above), ratio


@contextmanager
def _asked(algorithm: Algorithm, who: str, traj: Trajectory) -> Iterator[None]:
    """Around a call of a method that may be the user's: what it raises is told with its place, and it may change
    nothing of `traj`, from which the losses of all that follows are taken."""
    if type(algorithm).__module__.startswith("steersman."):
        yield
        return
    tensors = {f.name: x for f in fields(traj) if isinstance(x := getattr(traj, f.name), Tensor)}
    # Tensors made in inference mode count no changes.
    before = {name: x._version for name, x in tensors.items() if not x.is_inference()}
    with user_errors(who):
        yield
    changed = [name for name, version in before.items() if tensors[name]._version != version]
    if changed:
        raise SteersmanError(
            f"{who} changed traj.{changed[0]} in place; work on a copy of it, traj.{changed[0]}.clone()"
        )


def _require_steps(who: str, what: str, found: Any, shape: torch.Size) -> None:
    wanted = f"a floating tensor of shape [B, T] = {list(shape)} is expected"
    if not isinstance(found, Tensor) or found.shape != shape:
        raise SteersmanError(f"{who}: {what} is {_kind(found)}; {wanted}, one number for each step, not reduced")
    if not found.is_floating_point():
        raise SteersmanError(f"{who}: {what} is a tensor of {found.dtype}; {wanted}")


def _kind(found: Any) -> str:
    return f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
