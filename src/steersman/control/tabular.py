"""Tabular learners under the control verb: learn from episodes, then judge by the exact values of the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch

from steersman.control.recipe import ControlRecipe, TabularSettings
from steersman.run.seed import sub_seed
from steersman.tabular.gym import from_gymnasium
from steersman.tabular.learning import Learned, learn, linear, power
from steersman.tabular.mdp import policy_iteration
from steersman.types import Stats, SteersmanError


class Tabular:
    """One run of a tabular learner; its episodes are laid out as `rows` rows of the log: `iterations`, or as many
    as there are episodes.

    Learning takes seconds and is begun anew when a run is resumed.
    """

    def __init__(self, recipe: ControlRecipe, env: gym.Env) -> None:
        self.recipe, self.env = recipe, env
        self.settings: TabularSettings = recipe.settings
        self.rows = min(recipe.iterations, self.settings.episodes)
        self.learned: Learned | None = None
        self.whole = True

    def learn(self, check: Callable[[], None]) -> None:
        """All episodes. `check` is called after every step, and ends the learning by what it raises."""
        settings, recipe = self.settings, self.recipe
        method: Any = recipe.algorithm
        self.learned = learn(
            self.env,
            method,
            episodes=settings.episodes,
            discount=settings.gamma,
            alpha=power(settings.alpha, scale=settings.alpha_scale),
            epsilon=linear(settings.epsilon_start, settings.epsilon_end, max(settings.episodes // 2, 1)),
            seed=sub_seed(recipe.run.seed, "tabular") % 2**31,
            initial=settings.initial,
            check=check,
        )

    def row(self, step: int) -> Stats:
        """Means over the step's share of the episodes."""
        assert self.learned is not None
        part = slice(*(i * self.settings.episodes // self.rows for i in (step - 1, step)))
        return {
            "reward/return": float(self.learned.returns[part].mean()),
            "length/episode": float(self.learned.lengths[part].float().mean()),
            "env_steps": float(self.learned.lengths[: part.stop].sum()),
        }

    def against_optimum(self, tell: Callable[[str], None]) -> Stats:
        """The learned policy's exact value at the start beside the optimum, where the process is known; `tell` hears
        of one that has no finite value, as without a discount where a policy never ends."""
        assert self.learned is not None
        try:
            mdp = from_gymnasium(self.env, self.settings.gamma)
        except SteersmanError:
            return {}
        # the process has one more state, the end, in which any action will do
        policy = torch.cat([self.learned.policy, self.learned.policy.new_zeros(1)])
        try:
            optimum = float(mdp.start @ policy_iteration(mdp).value)
        except SteersmanError as error:
            tell(f"no optimum to compare with: {error}")
            return {}
        try:
            own = float(mdp.performance(policy))
        except SteersmanError as error:
            tell(f"the learned policy has no finite value: {error}")
            return {"optimum": optimum, "optimal": 0.0}
        return {"value": own, "optimum": optimum, "optimal": float(abs(own - optimum) <= 1e-9 * max(1, abs(optimum)))}

    def position(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {} if self.learned is None else {"q": self.learned.q}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the same seed learns the same table."""
