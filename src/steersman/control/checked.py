"""An environment whose steps are looked at: a reward or observation that is no finite number is named at once."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from steersman.guards.raised import user_errors
from steersman.types import SteersmanError

LARGEST = 1e16
"""Rewards are in [-LARGEST, LARGEST]: the squares of their sums must stay within float32."""


class Checked(gym.Wrapper):
    """Raises SteersmanError, naming environment, copy, episode and step, for a reward that is no finite number, an
    observation that is not finite, what its code raises, and code that asks the process to end."""

    def __init__(self, env: gym.Env, copy: int) -> None:
        super().__init__(env)
        spec = env.spec
        self.who = f"environment {spec.id if spec is not None else type(env.unwrapped).__name__}, copy {copy}"
        self.episode = self.steps = 0

    def reset(self, **given: Any) -> tuple[Any, dict[str, Any]]:
        self.episode, self.steps = self.episode + 1, 0
        with user_errors(self._place()):
            obs, info = self.env.reset(**given)
        return self._observation(obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        with user_errors(self._place()):
            obs, reward, terminated, truncated, info = self.env.step(action)
        return self._observation(obs), self._reward(reward), terminated, truncated, info

    def _place(self) -> str:
        return f"{self.who}, episode {self.episode}, step {self.steps}"

    def _reward(self, given: Any) -> float:
        value = np.asarray(given)
        if value.ndim or value.dtype.kind not in "biuf" or not abs(float(value)) <= LARGEST:
            shape = f"an array of shape {list(value.shape)}: " if value.ndim else ""
            raise SteersmanError(
                f"{self._place()}: the reward is {shape}{str(given)[:80]} ({type(given).__name__}); give one finite "
                f"number within {LARGEST:g}"
            )
        return float(value)

    def _observation(self, given: Any) -> Any:
        value = np.asarray(given)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise SteersmanError(f"{self._place()}: the observation holds NaN or infinity: {str(given)[:80]}")
        return given
