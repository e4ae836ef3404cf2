"""The last stages of the on-policy loop: minibatches -> loss -> update, for perceptrons.

A minibatch is drawn from single steps, each laid out as a row of its own: the losses that a control method may
choose look at one step at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from steersman.advantage.gae import Advantage
from steersman.algorithms import Algorithm, Coefficients
from steersman.control.policies import MLPPolicy, Value
from steersman.loss.policy import clip_fraction
from steersman.loss.reduce import denominator, reduce, token_weight
from steersman.loss.value import value_loss
from steersman.ops.kl import kl_estimate
from steersman.run.micro import split_evenly
from steersman.train.tally import Tally
from steersman.types import Stats, Trajectory
from steersman.update.natural import trust_region_step
from steersman.update.optimizer import NotFiniteError, Optimizer


@dataclass(slots=True)
class Transitions:
    """The steps that count, one per row: M of them."""

    obs: Tensor
    action: Tensor
    traj: Trajectory
    adv: Tensor
    weight: Tensor
    value: Tensor | None = None
    ret: Tensor | None = None

    def __len__(self) -> int:
        return len(self.obs)

    def rows(self, index: Tensor) -> Transitions:
        return Transitions(
            self.obs[index],
            self.action[index],
            self.traj.rows(index),
            self.adv[index],
            self.weight[index],
            None if self.value is None else self.value[index],
            None if self.ret is None else self.ret[index],
        )


def flatten(obs: Tensor, action: Tensor, traj: Trajectory, advantage: Advantage, weight: Tensor) -> Transitions:
    """`obs` [B, T+1, D] and the rest [B, T] as M rows of one step."""
    mask = traj.mask

    def column(x: Tensor) -> Tensor:
        return x[mask][:, None]

    steps = Trajectory(column(mask), column(traj.reward), column(traj.discount), column(traj.logp_old))
    value = None if traj.value is None else column(traj.value[:, :-1])
    ret = None if advantage.ret is None else column(advantage.ret)
    return Transitions(obs[:, :-1][mask], action[mask], steps, column(advantage.adv), column(weight), value, ret)


@dataclass(slots=True)
class Learner:
    """Policy and critic with their optimisers, and the algorithm that says what their losses are.

    `length_limit` is the fixed divisor of the "episode" average.
    """

    algorithm: Algorithm
    policy: MLPPolicy
    actor: Optimizer
    critic: Value | None = None
    critic_optimizer: Optimizer | None = None
    length_limit: float = 1.0
    value_clip: float | None = None

    def update(
        self,
        obs: Tensor,
        action: Tensor,
        traj: Trajectory,
        advantage: Advantage,
        coef: Coefficients,
        generator: torch.Generator,
    ) -> Stats:
        """All epochs over one iteration's steps; returns losses, norms and how far the policy moved."""
        average = self.algorithm.average
        weight = token_weight(traj.mask, average, self.length_limit) / denominator(traj.mask, average)
        batch = flatten(obs, action, traj, advantage, weight * traj.mask.sum())
        tally, stats = Tally(), Stats()
        with_policy = self.algorithm.update == "gradient"
        if not with_policy:
            stats |= self._trust_region(self.algorithm, batch, coef)
        for epoch in range(self.algorithm.epochs):
            moved = 0.0
            order = torch.randperm(len(batch), generator=generator)
            for part, index in enumerate(split_evenly(order, self.algorithm.minibatches)):
                rows = batch.rows(index)
                if with_policy:
                    moved = self._actor_step(rows, coef, tally, first=epoch == 0 and part == 0)
                if self.critic is not None:
                    self._critic_step(rows, tally)
            if self.algorithm.stop_kl is not None and moved > self.algorithm.stop_kl:
                stats["epochs"] = epoch + 1.0
                break
        stats |= tally.means()
        if with_policy and self.algorithm.kl_to_sampler() is not None:
            with torch.no_grad():
                logp = self.policy.distribution(batch.obs).log_prob(batch.action)[:, None]
                stats["kl/old"] = float(kl_estimate(batch.traj.logp_old, logp, "k3").mean())
        return stats

    def policy_loss(self, batch: Transitions, coef: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the steps, reduced; their log-probabilities [M, 1] and entropies [M, 1]."""
        distribution = self.policy.distribution(batch.obs)
        logp, entropy = distribution.log_prob(batch.action)[:, None], distribution.entropy()[:, None]
        per_step = self.algorithm.loss(logp, batch.traj, batch.adv, coef) - self.algorithm.entropy_coef * entropy
        return reduce(per_step, batch.weight, len(batch)), logp.detach(), entropy.detach()

    def _actor_step(self, batch: Transitions, coef: Coefficients, tally: Tally, *, first: bool) -> float:
        loss, logp, entropy = self.policy_loss(batch, coef)
        if not torch.isfinite(loss):
            raise NotFiniteError(f"the policy's loss is {float(loss)}")
        loss.backward()
        steps, old = len(batch), batch.traj.logp_old
        moved = float(kl_estimate(old, logp, "k3").mean())
        tally.add("loss/policy", loss * steps, steps)
        tally.add("entropy/policy", entropy.sum(), steps)
        tally.add("kl/old", moved * steps, steps)
        if first:
            tally.add("ratio_gap", (logp - old).abs().max(), 1)
        clipped = self.algorithm.clip_range()
        if clipped is not None:
            tally.add("clip_fraction", clip_fraction(logp, old, batch.traj.mask, *clipped) * steps, steps)
        step = self.actor.step()
        tally.add("grad_norm/actor", step["grad_norm"], 1)
        tally.add("lr/actor", step["lr"], 1)
        return moved

    def _critic_step(self, batch: Transitions, tally: Tally) -> None:
        critic, optimizer, value, ret = self.critic, self.critic_optimizer, batch.value, batch.ret
        assert critic and optimizer and value is not None and ret is not None  # noqa: PT018
        loss = value_loss(critic(batch.obs)[:, None], value, ret, self.value_clip).mean()
        if not torch.isfinite(loss):
            raise NotFiniteError(f"the critic's loss is {float(loss)}")
        loss.backward()
        tally.add("loss/value", loss * len(batch), len(batch))
        tally.add("grad_norm/critic", optimizer.step()["grad_norm"], 1)

    def _trust_region(self, algorithm: Any, batch: Transitions, coef: Coefficients) -> Stats:
        """TRPO's step: surrogate and exact KL over whole distributions."""
        with torch.no_grad():
            old = self.policy.distribution(batch.obs)
            entropy = float(old.entropy().mean())
        stats = trust_region_step(
            self.actor.parameters,
            [lambda: self.policy_loss(batch, coef)[0]],
            [lambda: kl_divergence(old, self.policy.distribution(batch.obs)).mean()],
            max_kl=algorithm.max_kl,
            cg_steps=algorithm.cg_steps,
            damping=algorithm.damping,
            backtracks=algorithm.backtracks,
            backtrack_ratio=algorithm.backtrack_ratio,
        )
        return stats | {"grad_norm/actor": stats.pop("grad_norm"), "entropy/policy": entropy}
