"""Does a method, run on sampled data, reach the optimum that is known in closed form?

The policy is a table of logits on a token MDP, the critic a table of values. One number per seed: how much of the
way from the reference's J to the best possible J* a fixed budget of samples has gone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steersman.advantage.gae import Advantage
from steersman.advantage.returns import episode_return
from steersman.algorithms import Algorithm, Coefficients
from steersman.loss.value import value_loss
from steersman.ops.kl import kl_estimate
from steersman.ops.masked import masked_mean
from steersman.tabular.token_mdp import TokenMDP
from steersman.types import Stats, Trajectory
from steersman.update.kl_controller import KLCoefficients
from steersman.update.on_policy import Problem, learn
from steersman.update.returned import advantage_of
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
        self.coefficients = KLCoefficients(algorithm, budget.prompts * budget.size)
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
        batch = TableBatch(self, rows, traj, advantage_of(algorithm, traj), old, self.coefficients.current())
        self.coefficients.adapt(learn(algorithm, batch, self.generator))
        mask = algorithm.sampling_mask()
        if mask is not None and (iteration + 1) % mask.every == 0:
            self.forbidden = masked(algorithm, self.logits.detach(), mdp.eos).isinf()

    def logp(self, rows: Tensor) -> Tensor:
        """log pi `[B, T]` of sampled sequences."""
        return self.mdp.sequence_logp(self.policy())[rows]

    def _baseline(self, traj: Trajectory, old: Tensor, rows: Tensor) -> None:
        if self.algorithm.baseline == "greedy":
            greedy = self.mdp.trajectory(old, self.mdp.greedy(old), kl=False)
            traj.baseline = episode_return(greedy)[self.mdp.prompt[rows]]
        elif (wanted := self.algorithm.optimal_value()) is not None:
            traj.baseline = self.mdp.soft_value(wanted.beta)[self.mdp.prompt[rows]]
        elif self.algorithm.baseline == "moving":
            traj.baseline = self.moving.expand(len(rows))
            self.moving = 0.9 * self.moving + 0.1 * episode_return(traj).mean()


@dataclass(slots=True)
class TableBatch:
    """One iteration's sequences beside the two tables; `old` are the logits that they were sampled from."""

    run: Run
    rows: Tensor
    traj: Trajectory
    advantage: Advantage
    old: Tensor
    coef: Coefficients

    def __len__(self) -> int:
        return len(self.rows)

    def gradients(self, rows: Tensor, *, actor: bool, first: bool) -> float:
        run, part, chosen = self.run, self.traj.rows(rows), self.rows[rows]
        T, moved = part.mask.shape[1], 0.0
        if actor:
            logp = run.logp(chosen)[:, :T]
            loss_given(run.algorithm, self.advantage.adv[rows, :T], logp, part, self.coef).backward()
            moved = float(masked_mean(kl_estimate(part.logp_old, logp.detach(), "k3"), part.mask))
        if self.advantage.ret is not None:
            value, ret = run.mdp.along(run.critic, chosen)[:, :T], self.advantage.ret[rows, :T]
            masked_mean(value_loss(value, value.detach(), ret), part.mask).backward()
        return moved

    def step(self, *, actor: bool) -> Stats:
        if actor:
            self.run.actor_step.step()
        if self.advantage.ret is not None:
            self.run.critic_step.step()
        self.zero_grad()
        return {}

    def zero_grad(self) -> None:
        self.run.actor_step.zero_grad()
        self.run.critic_step.zero_grad()

    def problem(self) -> Problem:
        run, traj, rows = self.run, self.traj, self.rows
        before = torch.log_softmax(run.mdp.along(self.old, rows)[:, :-1], -1)

        def surrogate() -> Tensor:
            return loss_given(run.algorithm, self.advantage.adv, run.logp(rows), traj, self.coef)

        def distance() -> Tensor:
            new = torch.log_softmax(run.mdp.along(run.logits, rows)[:, :-1], -1)
            return masked_mean((before.exp() * (before - new)).sum(-1), traj.mask)

        return Problem([run.logits], [surrogate], [distance])

    @torch.no_grad()
    def moved(self) -> float:
        new = self.run.logp(self.rows)
        return float(masked_mean(kl_estimate(self.traj.logp_old, new, "k3"), self.traj.mask))
