"""The last stages of the on-policy loop: minibatches -> loss -> update, for perceptrons.

A minibatch is drawn from single steps, each laid out as a row of its own: the losses that a control method may
choose look at one step at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from steersman.advantage.gae import Advantage
from steersman.algorithms import Algorithm, Coefficients
from steersman.control.policies import MLPPolicy, Value
from steersman.loss.masks import top_entropy
from steersman.loss.reduce import denominator, reduce, token_weight
from steersman.loss.value import value_loss
from steersman.ops.kl import kl_estimate
from steersman.train.tally import Tally
from steersman.types import Stats, Trajectory, send
from steersman.update.on_policy import Problem, clipped_steps, learn, policy_loss, step_both, zero_both
from steersman.update.optimizer import Optimizer, not_finite


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
        index = send(index, self.obs.device)
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
        average, taught = self.algorithm.average, self._taught(obs, traj)
        weight = token_weight(taught, average, self.length_limit) / denominator(taught, average)
        steps = flatten(obs, action, traj, advantage, weight * traj.mask.sum())
        batch = StepBatch(self, steps, coef)
        stats = learn(self.algorithm, batch, generator)
        return batch.tally.means() | stats

    @torch.no_grad()
    def _taught(self, obs: Tensor, traj: Trajectory) -> Tensor:
        """The steps `[B, T]` that the policy learns from."""
        if self.algorithm.top_entropy == 1:
            return traj.mask
        entropy = torch.zeros_like(traj.reward)
        entropy[traj.mask] = self.policy.distribution(obs[:, :-1][traj.mask]).entropy().to(entropy)
        return top_entropy(entropy, traj.mask, self.algorithm.top_entropy)

    def policy_loss(self, steps: Transitions, coef: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the steps, reduced; their log-probabilities [M, 1] and entropies [M, 1]."""
        distribution = self.policy.distribution(steps.obs)
        logp, entropy = distribution.log_prob(steps.action)[:, None], distribution.entropy()[:, None]
        per_step = policy_loss(self.algorithm, logp, steps.traj, steps.adv, coef, entropy=entropy)
        return reduce(per_step, steps.weight, len(steps)), logp.detach(), entropy.detach()


@dataclass(slots=True)
class StepBatch:
    """One iteration's steps beside the networks that learn from them."""

    learner: Learner
    steps: Transitions
    coef: Coefficients
    tally: Tally = field(default_factory=Tally)

    def __len__(self) -> int:
        return len(self.steps)

    def gradients(self, rows: Tensor, *, actor: bool, first: bool) -> float:
        part, learner, losses = self.steps.rows(rows), self.learner, {}
        moved = 0.0
        if actor:
            losses["policy"], moved = self._actor_loss(part, first=first)
        if learner.critic is not None:
            assert part.value is not None
            assert part.ret is not None
            value = learner.critic(part.obs)[:, None]
            losses["value"] = value_loss(value, part.value, part.ret, learner.value_clip).mean()
            self.tally.add("loss/value", losses["value"] * len(part), len(part))
        if (error := not_finite([{name: loss.detach() for name, loss in losses.items()}])) is not None:
            raise error
        for loss in losses.values():
            loss.backward()
        return moved

    def step(self, *, actor: bool) -> Stats:
        return step_both(self.learner.actor, self.learner.critic_optimizer, with_actor=actor)

    def zero_grad(self) -> None:
        zero_both(self.learner.actor, self.learner.critic_optimizer)

    @torch.no_grad()
    def moved(self) -> float:
        logp = self.learner.policy.distribution(self.steps.obs).log_prob(self.steps.action)[:, None]
        return float(kl_estimate(self.steps.traj.logp_old, logp, "k3").mean())

    def problem(self) -> Problem:
        """Surrogate, and exact KL over whole distributions."""
        learner, steps = self.learner, self.steps
        with torch.no_grad():
            old = learner.policy.distribution(steps.obs)
            self.tally.add("entropy/policy", old.entropy().sum(), len(steps))
        return Problem(
            learner.actor.parameters,
            [lambda: learner.policy_loss(steps, self.coef)[0]],
            [lambda: kl_divergence(old, learner.policy.distribution(steps.obs)).mean()],
        )

    def _actor_loss(self, part: Transitions, *, first: bool) -> tuple[Tensor, float]:
        loss, logp, entropy = self.learner.policy_loss(part, self.coef)
        count, old, tally = len(part), part.traj.logp_old, self.tally
        moved = float(kl_estimate(old, logp, "k3").mean())
        tally.add("loss/policy", loss * count, count)
        tally.add("entropy/policy", entropy.sum(), count)
        tally.add("kl/old", moved * count, count)
        if first:
            tally.add("ratio_gap", (logp - old).abs().max(), 1)
        clipped = clipped_steps(self.learner.algorithm, logp, part.traj)
        if clipped is not None:
            tally.add("clip_fraction", (clipped & part.traj.mask).sum(), count)
        return loss, moved
