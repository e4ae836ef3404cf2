"""DQN, the value-based counterpart: collect -> store -> sample -> TD target -> loss -> update -> observe.

Source: Mnih et al., Nature 518 (2015); double DQN: arXiv 1509.06461.
Departures: many updates follow many steps instead of one after every few, and epsilon is the same within an
iteration; observations are vectors; Adam with gradient clipping in the place of RMSprop.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steersman.control.envs import Worlds
from steersman.control.experience import Act, Experience, collect
from steersman.control.loop import episode_stats
from steersman.control.policies import ActionValue
from steersman.control.recipe import ControlRecipe, DQNSettings
from steersman.run.seed import stream
from steersman.train.tally import Tally
from steersman.types import Stats
from steersman.update.optimizer import NotFiniteError, Optimizer

KEPT = ("obs", "next_obs", "action", "reward", "discount")
"""What a replay buffer holds of each transition."""


class Replay:
    """The last `size` transitions, overwritten in the order they came, of all copies alike."""

    def __init__(self, size: int, obs_size: int) -> None:
        self.size, self.next, self.count = size, 0, 0
        self.obs, self.next_obs = torch.zeros(size, obs_size), torch.zeros(size, obs_size)
        self.action = torch.zeros(size, dtype=torch.int64)
        self.reward, self.discount = torch.zeros(size), torch.zeros(size)

    def add(self, seen: Experience, gamma: float, reward_scale: float) -> None:
        """Every step of the experience as (s, a, r, gamma * (1 - terminated), s'), or the last `size` of them."""
        mask = seen.mask
        taken = (seen.begun[:, None] + torch.arange(mask.shape[1]))[mask]
        last = taken.argsort(stable=True)[-self.size :]
        place = (self.next + torch.arange(len(last))) % self.size
        self.obs[place], self.next_obs[place] = seen.obs[:, :-1][mask][last], seen.obs[:, 1:][mask][last]
        self.action[place], self.reward[place] = seen.action[mask][last], seen.reward[mask][last] * reward_scale
        self.discount[place] = seen.discount(gamma)[mask][last]
        self.next, self.count = (self.next + len(last)) % self.size, min(self.count + len(last), self.size)

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(s, a, r, discount, s') of `batch` transitions drawn evenly, with replacement."""
        i = torch.randint(self.count, (batch,), generator=generator)
        return self.obs[i], self.action[i], self.reward[i], self.discount[i], self.next_obs[i]

    def state_dict(self) -> dict[str, Any]:
        held = slice(0, self.count)
        return {name: getattr(self, name)[held].clone() for name in KEPT} | {"next": self.next, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.count = state["next"], state["count"]
        for name in KEPT:
            getattr(self, name)[: self.count] = state[name]


class DQN:
    """One DQN run: environments, Q-network, target network, replay buffer, optimiser."""

    def __init__(self, recipe: ControlRecipe, worlds: Worlds, device: torch.device) -> None:
        self.recipe, self.worlds, self.device = recipe, worlds, device
        self.settings: DQNSettings = recipe.settings
        self.q = ActionValue(worlds.obs_size, worlds.actions, recipe.network).to(device)
        self.target = copy.deepcopy(self.q).requires_grad_(False)
        # iterations that only fill the buffer make no update, and the schedule spans those that do
        idle = -(-self.settings.learning_starts // (recipe.rollout.copies * recipe.rollout.steps)) - 1
        total = (recipe.iterations - idle) * self.settings.updates
        self.optimizer = Optimizer(self.q.parameters(), recipe.optimizer, total)
        self.replay = Replay(self.settings.replay, worlds.obs_size)
        self.done, self.env_steps, self.whole = 0, 0, True

    def iteration(self) -> Stats:
        """One pass through the loop."""
        settings, tally = self.settings, Tally()
        epsilon = self.epsilon()
        seen = collect(self.worlds, self.exploring(epsilon), self.recipe.rollout.steps)
        self.whole = False
        self.replay.add(seen, settings.gamma, self.recipe.rollout.reward_scale)
        self.env_steps += int(seen.length.sum())
        if self.env_steps >= settings.learning_starts:
            generator = stream(self.recipe.run.seed, "replay", self.done)
            for _ in range(settings.updates):
                self.update(generator, tally)
        self.done += 1
        return tally.means() | episode_stats(seen) | {"env_steps": float(self.env_steps), "epsilon": epsilon}

    def update(self, generator: torch.Generator, tally: Tally) -> None:
        """One gradient step on the Huber loss of the TD errors of one batch."""
        batch = self.replay.sample(self.settings.batch, generator)
        obs, action, reward, discount, after = (x.to(self.device) for x in batch)
        target = td_target(self.q, self.target, reward, discount, after, double=self.settings.double)
        value = self.q(obs).gather(1, action[:, None]).squeeze(1)
        loss = nn.functional.smooth_l1_loss(value, target)
        if not torch.isfinite(loss):
            raise NotFiniteError(f"the loss is {float(loss)}")
        loss.backward()
        step = self.optimizer.step()
        tally.add("loss/td", loss, 1)
        tally.add("value/mean", value.mean(), 1)
        tally.add("grad_norm/q", step["grad_norm"], 1)
        tally.add("lr/q", step["lr"], 1)
        if self.optimizer.updates % self.settings.target_every == 0:
            self.target.load_state_dict(self.q.state_dict())

    def epsilon(self) -> float:
        """Falls linearly from `epsilon_start` to `epsilon_end` over the first `epsilon_share` of the run."""
        settings = self.settings
        done = min(self.done / max(settings.epsilon_share * self.recipe.iterations, 1), 1.0)
        return settings.epsilon_start + done * (settings.epsilon_end - settings.epsilon_start)

    def exploring(self, epsilon: float) -> Act:
        """Acts greedily, or with probability epsilon evenly at random."""
        generator = stream(self.recipe.run.seed, "actions", self.done)

        return lambda obs: self._explore(obs, epsilon, generator)

    def _explore(self, obs: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        explore = torch.rand(len(obs), generator=generator) < epsilon
        any_action = torch.randint(self.worlds.actions, (len(obs),), generator=generator)
        return torch.where(explore, any_action, self.greedy(obs).cpu())

    def greedy(self, obs: Tensor) -> Tensor:
        return self.q.mode(obs.to(self.device))

    def sampled(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """With the epsilon that training ends on."""
        explore = torch.rand(len(obs), generator=generator) < self.settings.epsilon_end
        return torch.where(
            explore, torch.randint(self.worlds.actions, (len(obs),), generator=generator), self.greedy(obs).cpu()
        )

    def modules(self) -> dict[str, torch.nn.Module | None]:
        """What it learns, by name."""
        return {"Q": self.q}

    def networks(self) -> dict[str, Any]:
        return {"q": self.q.state_dict()}

    def position(self) -> dict[str, Any]:
        return {"worlds": self.worlds.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        return self.networks() | {
            "done": self.done,
            "env_steps": self.env_steps,
            "worlds": self.worlds.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "replay": self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.env_steps = state["done"], state["env_steps"]
        self.worlds.load_state_dict(state["worlds"])
        self.q.load_state_dict(state["q"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.replay.load_state_dict(state["replay"])


@torch.no_grad()
def td_target(
    q: ActionValue,
    target: ActionValue,
    reward: Float[Tensor, " M"],
    discount: Float[Tensor, " M"],
    after: Float[Tensor, "M D"],
    *,
    double: bool,
) -> Float[Tensor, " M"]:
    """r + discount Q'(s', argmax_a Q''(s', a)), Q' the target network.

    Q'' is the target network itself (DQN), or with `double` the network that learns, so that the choice of the
    action and its value do not share their errors. Source: arXiv 1509.06461, eq. 4.
    """
    value = target(after)
    best: Int[Tensor, " M"] = (q(after) if double else value).argmax(-1)
    return reward + discount * value.gather(1, best[:, None]).squeeze(1)
