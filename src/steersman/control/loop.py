"""The on-policy loop on Gymnasium: collect -> advantage -> minibatches -> loss -> update -> observe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steersman.advantage.returns import values
from steersman.algorithms import Algorithm
from steersman.control.envs import Normaliser, Worlds
from steersman.control.experience import Experience, collect, collect_episodes
from steersman.control.learner import Learner
from steersman.control.policies import Value, policy_for
from steersman.control.recipe import ControlRecipe
from steersman.loss.value import explained_variance
from steersman.run.seed import stream
from steersman.types import Stats, Trajectory
from steersman.update.kl_controller import KLCoefficients
from steersman.update.optimizer import Optimizer
from steersman.update.returned import advantage_of


class ControlLoop:
    """One on-policy run: environments, policy, critic, optimisers and all that a resumed run needs."""

    def __init__(self, recipe: ControlRecipe, worlds: Worlds, device: torch.device) -> None:
        self.recipe, self.worlds, self.device = recipe, worlds, device
        self.algorithm: Algorithm = recipe.settings
        self.normaliser = Normaliser(worlds.obs_size) if recipe.rollout.normalise else None
        self.learner = self._learner()
        self.policy, self.critic = self.learner.policy, self.learner.critic
        self.coefficients = KLCoefficients(self.algorithm, recipe.rollout.copies)
        self.done, self.env_steps, self.whole = 0, 0, True

    def iteration(self) -> Stats:
        """One pass through the loop."""
        seen = self.collect(stream(self.recipe.run.seed, "actions", self.done))
        obs, action, traj = self.experience(seen)
        advantage = advantage_of(self.algorithm, traj)
        order = stream(self.recipe.run.seed, "minibatches", self.done)
        self.whole = False
        stats = self.learner.update(obs, action, traj, advantage, self.coefficients.current(), order)
        return stats | self.observe(seen, traj, advantage.ret, stats)

    def collect(self, generator: torch.Generator) -> Experience:
        """Whole episodes, or a fixed number of steps of every copy."""

        def act(obs: Tensor) -> Tensor:
            return self.policy.sample(self.see(obs), generator)

        rollout = self.recipe.rollout
        if rollout.episodes is not None:
            return collect_episodes(self.worlds, act, rollout.episodes)
        return collect(self.worlds, act, rollout.steps)

    @torch.no_grad()
    def experience(self, seen: Experience) -> tuple[Tensor, Tensor, Trajectory]:
        """Observations as the networks see them, actions, and the trajectory with log-probabilities and values."""
        obs, action, mask = self.see(seen.obs), seen.action.to(self.device), seen.mask.to(self.device)
        logp_old = torch.zeros(mask.shape, device=self.device)
        logp_old[mask] = self.policy.distribution(obs[:, :-1][mask]).log_prob(action[mask])
        value = None if self.critic is None else self.critic(obs)
        traj = Trajectory(
            mask=mask,
            reward=(seen.reward * self.recipe.rollout.reward_scale).to(self.device),
            discount=seen.discount(self.algorithm.gamma).to(self.device),
            logp_old=logp_old,
            value=value,
        )
        return obs, action, traj

    def observe(self, seen: Experience, traj: Trajectory, ret: Tensor | None, updated: Stats) -> Stats:
        """Numbers of the iteration; moves what moves between iterations: KL coefficient, normaliser, counters."""
        self.coefficients.adapt(updated)
        if self.normaliser is not None:
            self.normaliser.update(seen.obs[:, :-1][seen.mask])
        self.done += 1
        self.env_steps += int(seen.length.sum())
        stats: Stats = {"env_steps": float(self.env_steps)} | episode_stats(seen)
        if self.algorithm.kl_to_sampler() is not None:
            stats["coefficient/beta_old"] = self.coefficients.beta_old.coef
        if ret is not None:
            stats["explained_variance"] = float(explained_variance(values(traj)[0], ret, traj.mask))
        return stats

    def see(self, obs: Tensor) -> Tensor:
        """Observations as the networks are given them. The statistics stay as they are within an iteration."""
        return (obs if self.normaliser is None else self.normaliser(obs)).to(self.device)

    def greedy(self, obs: Tensor) -> Tensor:
        return self.policy.mode(self.see(obs))

    def sampled(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        return self.policy.sample(self.see(obs), generator)

    def modules(self) -> dict[str, torch.nn.Module | None]:
        """What it learns, by name."""
        return {"policy": self.policy, "critic": self.critic}

    def networks(self) -> dict[str, Any]:
        """Weights of the policy and what it needs to see, for the file that a run leaves."""
        normaliser = None if self.normaliser is None else self.normaliser.state_dict()
        return {"policy": self.policy.state_dict(), "normaliser": normaliser}

    def position(self) -> dict[str, Any]:
        return {"worlds": self.worlds.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        learner = self.learner
        return self.networks() | {
            "done": self.done,
            "env_steps": self.env_steps,
            "worlds": self.worlds.state_dict(),
            "actor": learner.actor.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "critic_optimizer": None if learner.critic_optimizer is None else learner.critic_optimizer.state_dict(),
            **self.coefficients.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.env_steps = state["done"], state["env_steps"]
        self.worlds.load_state_dict(state["worlds"])
        self.policy.load_state_dict(state["policy"])
        self.learner.actor.load_state_dict(state["actor"])
        self.coefficients.load_state_dict(state)
        if self.normaliser is not None:
            self.normaliser.load_state_dict(state["normaliser"])
        if self.critic is not None and self.learner.critic_optimizer is not None:
            self.critic.load_state_dict(state["critic"])
            self.learner.critic_optimizer.load_state_dict(state["critic_optimizer"])

    def _learner(self) -> Learner:
        recipe, worlds, algorithm = self.recipe, self.worlds, self.algorithm
        policy = policy_for(worlds.action_space, worlds.obs_size, worlds.actions, recipe.network).to(self.device)
        passes = recipe.iterations * algorithm.epochs * algorithm.minibatches
        learner = Learner(algorithm, policy, Optimizer(policy.parameters(), recipe.optimizer, passes))
        learner.length_limit = float(worlds.time_limit)
        if recipe.critic is not None:
            learner.critic = Value(worlds.obs_size, recipe.network).to(self.device)
            learner.critic_optimizer = Optimizer(learner.critic.parameters(), recipe.critic.optimizer, passes)
            learner.value_clip = recipe.critic.value_clip
        return learner


def episode_stats(seen: Experience) -> Stats:
    """Mean return and length of the episodes that ended, in the environment's own rewards."""
    if not seen.returns:
        return {}
    count = len(seen.returns)
    return {"reward/return": sum(seen.returns) / count, "length/episode": sum(seen.lengths) / count}
