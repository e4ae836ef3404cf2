"""Does a method, run on sampled data, reach the optimum that is known in closed form?

The policy is a table of logits on a token MDP, the critic a table of values. One number per seed: how much of the
way from the reference's J to the best possible J* a fixed budget of samples has gone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steersman.advantage.returns import episode_return
from steersman.algorithms import Algorithm, Coefficients
from steersman.loss.value import value_loss
from steersman.ops.kl import kl_estimate
from steersman.ops.masked import masked_mean
from steersman.tabular.token_mdp import TokenMDP
from steersman.types import Trajectory
from steersman.update.kl_controller import kl_to_sampler_controller
from steersman.update.natural import trust_region_step
from steersman.verify.gradient import loss_given, masked


@dataclass(frozen=True, slots=True)
class Budget:
    """What every method is given: `iterations` of `prompts` x `size` sampled sequences."""

    iterations: int = 200
    prompts: int = 32
    size: int = 4
    lr: float = 0.1
    lr_critic: float = 0.1


@dataclass(frozen=True, slots=True)
class Way:
    """Shares of the way from the reference's J: to J*, and to the best J that the method's support allows."""

    optimum: float
    allowed: float


def example() -> TokenMDP:
    """Four tokens, two prompts with 40 answers each of one to three tokens, standard normal scores, beta 0.3."""
    return TokenMDP.random(4, 3, 0.3, seed=0, prompts=2)


def way_to_optimum(algorithm: Algorithm, mdp: TokenMDP, seed: int, budget: Budget | None = None) -> Way:
    """(J(pi) - J(ref)) / (J* - J(ref)) after training from the reference; 1 is the optimum."""
    run = Run(algorithm.model_copy(update={"beta": mdp.beta}), mdp, seed, budget or Budget())
    for iteration in range(run.budget.iterations):
        run.iteration(iteration)
    with torch.no_grad():
        low, here = float(mdp.objective(mdp.logp_ref)), float(mdp.objective(run.policy()))
        gain = here - low
        return Way(gain / (float(mdp.j_star()) - low), gain / (best_within(mdp, run.policy()) - low))


def best_within(mdp: TokenMDP, logits: Tensor) -> float:
    """The largest J of any policy with the support of this one: E_x[ beta log sum pi_ref(y|x) exp(r / beta) ]."""
    own = (mdp.sequence_prob(logits) > 0) & (mdp.prompt == torch.arange(len(mdp.prompts))[:, None])
    if mdp.beta == 0:
        return float((mdp.prompt_prob * torch.where(own, mdp.total_reward, -math.inf).amax(-1)).sum())
    value = mdp.sequence_logp_ref.sum(-1) + mdp.total_reward / mdp.beta
    return float((mdp.prompt_prob * mdp.beta * torch.where(own, value, -math.inf).logsumexp(-1)).sum())


class Run:
    """The on-policy loop with tables in the place of models."""

    def __init__(self, algorithm: Algorithm, mdp: TokenMDP, seed: int, budget: Budget) -> None:
        self.algorithm, self.mdp, self.budget = algorithm, mdp, budget
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(mdp.logp_ref.clone())
        self.critic = nn.Parameter(torch.zeros(len(mdp.states), dtype=torch.float64))
        self.actor_step = torch.optim.Adam([self.logits], lr=budget.lr)
        self.critic_step = torch.optim.Adam([self.critic], lr=budget.lr_critic)
        self.beta_old = kl_to_sampler_controller(algorithm.kl_to_sampler())
        self.forbidden = masked(algorithm, self.logits.detach(), mdp.eos).isinf()
        self.moving = torch.zeros((), dtype=torch.float64)

    def policy(self) -> Tensor:
        """The logits that are sampled from: the table, for NLPO without what its lagging copy forbids."""
        return self.logits.masked_fill(self.forbidden, -torch.inf)

    def iteration(self, iteration: int) -> None:
        """prompts -> rollout -> reward -> advantage -> minibatches -> loss -> update."""
        algorithm, mdp, old = self.algorithm, self.mdp, self.policy().detach()
        # the rate falls to a fiftieth, so that the noise of the last batches is averaged away
        self.actor_step.param_groups[0]["lr"] = self.budget.lr * (1 - 0.98 * iteration / self.budget.iterations)
        size = self.budget.size if algorithm.group else 1
        draws = self.budget.prompts * self.budget.size // size
        rows = mdp.sample(old, draws, self.generator, size)
        group = torch.arange(draws).repeat_interleave(size)
        value = self.critic.detach() if algorithm.critic else torch.zeros_like(self.critic)
        traj = mdp.trajectory(
            old, rows, gamma=algorithm.gamma, kl=algorithm.kl_in == "reward", value=value, group=group
        )
        self._baseline(traj, old, rows)
        adv, ret = algorithm.advantage(traj)
        if algorithm.update == "trust_region":
            self._trust_region(algorithm, traj, adv, rows, old)
        for _ in range(algorithm.epochs):
            order = torch.randperm(len(rows), generator=self.generator)
            for part in order.tensor_split(algorithm.minibatches):
                self._minibatch(traj.rows(part), adv[part], ret if ret is None else ret[part], rows[part])
        if self.beta_old.coef > 0:
            new = self._logp(rows).detach()
            self.beta_old.update(float(masked_mean(kl_estimate(traj.logp_old, new, "k3"), traj.mask)))
        mask = algorithm.sampling_mask()
        if mask is not None and (iteration + 1) % mask.every == 0:
            self.forbidden = masked(algorithm, self.logits.detach(), mdp.eos).isinf()

    def _minibatch(self, traj: Trajectory, adv: Tensor, ret: Tensor | None, rows: Tensor) -> None:
        T = traj.mask.shape[1]
        if self.algorithm.update == "gradient":
            coef = Coefficients(self.mdp.beta, self.beta_old.coef)
            loss = loss_given(self.algorithm, adv[:, :T], self._logp(rows)[:, :T], traj, coef)
            self._descend(loss, self.actor_step)
        if ret is not None:
            value = self.mdp.along(self.critic, rows)[:, :T]
            self._descend(masked_mean(value_loss(value, value.detach(), ret[:, :T]), traj.mask), self.critic_step)

    def _trust_region(self, algorithm: Any, traj: Trajectory, adv: Tensor, rows: Tensor, old: Tensor) -> None:
        before = torch.log_softmax(self.mdp.along(old, rows)[:, :-1], -1)

        def surrogate() -> Tensor:
            return loss_given(algorithm, adv, self._logp(rows), traj, Coefficients())

        def distance() -> Tensor:
            new = torch.log_softmax(self.mdp.along(self.logits, rows)[:, :-1], -1)
            return masked_mean((before.exp() * (before - new)).sum(-1), traj.mask)

        trust_region_step(
            [self.logits], [surrogate], [distance], max_kl=algorithm.max_kl, cg_steps=algorithm.cg_steps,
            damping=algorithm.damping, backtracks=algorithm.backtracks, backtrack_ratio=algorithm.backtrack_ratio,
        )  # fmt: skip

    def _baseline(self, traj: Trajectory, old: Tensor, rows: Tensor) -> None:
        if self.algorithm.baseline == "greedy":
            greedy = self.mdp.trajectory(old, self.mdp.greedy(old), kl=False)
            traj.baseline = episode_return(greedy)[self.mdp.prompt[rows]]
        elif self.algorithm.baseline == "moving":
            traj.baseline = self.moving.expand(len(rows))
            self.moving = 0.9 * self.moving + 0.1 * episode_return(traj).mean()

    def _logp(self, rows: Tensor) -> Tensor:
        return self.mdp.sequence_logp(self.policy())[rows]

    @staticmethod
    def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
