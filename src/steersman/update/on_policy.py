"""The update of every on-policy method: epochs -> minibatches -> loss -> gradients -> step, whatever is learned.

Language models (`train/policy_update.py`), networks on Gymnasium (`control/learner.py`) and the tables of the exact
oracle (`verify/training.py`) are each a `Batch`; in what order a method's gradients are taken, when it stops and what
its loss is made of stands here alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steersman.algorithms.base import Algorithm, Coefficients
from steersman.distributed.micro import split_evenly
from steersman.loss.correction import Correction
from steersman.loss.masks import off_policy
from steersman.ops.kl import kl_loss
from steersman.types import Stats, Trajectory
from steersman.update.natural import Scalar, trust_region_step
from steersman.update.optimizer import Optimizer
from steersman.update.returned import clip_of, loss_of


class Problem(NamedTuple):
    """What a trust-region step is taken on: the actor, and in parts that add up the surrogate and KL(old || new)."""

    parameters: Sequence[nn.Parameter]
    surrogate: Sequence[Scalar]
    kl: Sequence[Scalar]


class Batch(Protocol):
    """One iteration's samples beside what learns from them."""

    def __len__(self) -> int:
        """How many rows minibatches are drawn from."""
        ...

    def gradients(self, rows: Int[Tensor, " b"], *, actor: bool, first: bool) -> float:
        """Adds the gradients of the rows' losses, the actor's if asked for; KL(old || new) per step before it moves.

        `first` says that nothing has been updated yet. Raises NotFiniteError naming the loss that is not a number.
        """
        ...

    def step(self, *, actor: bool) -> Stats:
        """One update by the gradients; rates and norms."""
        ...

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        ...

    def problem(self) -> Problem:
        """The trust-region step's, over all rows."""
        ...

    def moved(self) -> float:
        """KL(old || policy as it is now) in nats per step, over all rows."""
        ...


def learn(algorithm: Algorithm, batch: Batch, generator: torch.Generator, *, actor: bool = True) -> Stats:
    """All updates of one iteration; the last one's rates and norms, and what is particular to the method.

    A trust-region method moves its actor first, in one step on all rows, and its minibatches are the critic's alone.
    Minibatches end before the update at which KL to the sampler exceeds the algorithm's `stop_kl`; `epochs` then
    tells how many passes were made. `kl/old` is measured for a method that steers it, once the updates are done.
    Without `actor` the critic alone learns.
    """
    stats, region = Stats(), algorithm.trust_region()
    if region is not None and actor:
        found = trust_region_step(*batch.problem(), **region._asdict())
        stats |= found | {"grad_norm/actor": found.pop("grad_norm")}
    with_policy = actor and region is None
    stats |= _epochs(algorithm, batch, generator, with_policy)
    if with_policy and algorithm.kl_to_sampler() is not None:
        stats["kl/old"] = batch.moved()
    return stats


def _epochs(algorithm: Algorithm, batch: Batch, generator: torch.Generator, with_policy: bool) -> Stats:
    """All minibatches of all epochs, or those before `stop_kl`."""
    stats = Stats()
    for epoch in range(algorithm.epochs):
        order = torch.randperm(len(batch), generator=generator)
        for part, rows in enumerate(split_evenly(order, algorithm.minibatches)):
            moved = batch.gradients(rows, actor=with_policy, first=epoch == 0 and part == 0)
            if algorithm.stop_kl is not None and moved > algorithm.stop_kl:
                batch.zero_grad()
                return stats | {"epochs": epoch + part / algorithm.minibatches}
            stats |= batch.step(actor=with_policy)
    return stats


def step_both(actor: Optimizer, critic: Optimizer | None, *, with_actor: bool) -> Stats:
    """One update of the critic, where it has an optimiser of its own, and of the actor if asked for."""
    stats = {f"{name}/actor": x for name, x in actor.step().items()} if with_actor else Stats()
    if critic is not None:
        stats |= {f"{name}/critic": x for name, x in critic.step().items()}
    return stats


def zero_both(actor: Optimizer, critic: Optimizer | None) -> None:
    """Forgets the gradients of both."""
    actor.zero_grad()
    if critic is not None:
        critic.zero_grad()


def policy_loss(
    algorithm: Algorithm,
    logp: Float[Tensor, "B T"],
    traj: Trajectory,
    adv: Float[Tensor, "B T"],
    coef: Coefficients,
    *,
    entropy: Float[Tensor, "B T"] | None = None,
    correction: Correction | None = None,
) -> Float[Tensor, "B T"]:
    """w_t [ loss_t(log pi, A_t) + beta kl_t (if `kl_in` is "loss") ] - entropy_coef H_t, per step.

    What is an average over sampled actions is weighted by `correction` where another policy sampled them
    (`logp_rollout`), and by `traj.weight` where prompts were drawn unequally; the entropy needs no action.
    loss_t is 0 for bad responses that the policy has moved away from, with `off_policy_threshold`.
    """
    loss = loss_of(algorithm, logp, traj, adv, coef)
    left_out = dropped(algorithm, logp, traj, adv)
    if left_out is not None:
        loss = torch.where(left_out, 0.0, loss)
    if algorithm.kl_in == "loss" and traj.logp_ref is not None:
        loss = loss + coef.beta * kl_loss(logp, traj.logp_ref, traj.mask, algorithm.kl_estimator)
    if correction is not None and traj.logp_rollout is not None:
        loss = loss * correction.weight(traj.logp_old, traj.logp_rollout, traj.mask)
    if traj.weight is not None:
        loss = loss * traj.weight[:, None]
    if entropy is not None:
        loss = loss - algorithm.entropy_coef * entropy
    return loss


def clipped_steps(algorithm: Algorithm, logp: Float[Tensor, "B T"], traj: Trajectory) -> Bool[Tensor, "B T"] | None:
    """The steps whose ratio, as the method's clip reads it, lies outside `clip_range`; None without a clip."""
    clip = clip_of(algorithm, logp, traj)
    if clip is None:
        return None
    bounds, ratio = clip[0], clip[1].exp()
    return (ratio < 1 - bounds[0]) | (ratio > 1 + bounds[1])


def dropped(
    algorithm: Algorithm, logp: Float[Tensor, "B T"], traj: Trajectory, adv: Float[Tensor, "B T"]
) -> Bool[Tensor, "B T"] | None:
    """The steps that `off_policy_threshold` leaves out, by what the sampler itself recorded; None without one."""
    if algorithm.off_policy_threshold is None:
        return None
    sampled = traj.logp_old if traj.logp_rollout is None else traj.logp_rollout
    return off_policy(logp, sampled, adv, traj.mask, algorithm.off_policy_threshold)
