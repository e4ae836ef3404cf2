"""Environments that give what training can't take are named with the step."""

from __future__ import annotations

import os
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from steersman.control.envs import Worlds
from steersman.control.experience import collect
from steersman.types import SteersmanError


class Odd(gym.Env):
    """Gives `odd` as the third step's reward, or calls it."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, odd, observation=0.0):
        self.odd, self.observation = odd, observation

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action) -> Any:
        self.t += 1
        third = self.t == 3
        reward = (self.odd() if callable(self.odd) else self.odd) if third else 1.0
        return np.full(2, self.observation if third else 0.0, np.float32), reward, False, False, {}


def played(odd, **extra):
    worlds = Worlds(lambda: Odd(odd, **extra), 2, 0, "test")
    return collect(worlds, lambda obs: torch.zeros(len(obs), dtype=torch.int64), 4)


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (float("nan"), r"the reward is nan \(float\)"),
        (-float("inf"), "the reward is -inf"),
        (1e30, r"the reward is 1e\+30"),
        (10**400, "the reward is 1000"),
        (np.array([1.0]), r"an array of shape \[1\]: \[1\.\] \(ndarray\)"),
        (np.ones((2, 2)), r"an array of shape \[2, 2\]"),
        ([1.0, 2.0], r"an array of shape \[2\]"),
        (None, r"the reward is None \(NoneType\)"),
        ("1.0", r"the reward is 1\.0 \(str\)"),
        (1 + 2j, r"\(complex\)"),
        (lambda: sys.exit(0), r"asked the process to end, by sys\.exit\(0\)"),
        (lambda: os._exit(0), r"asked the process to end, by os\._exit\(0\)"),
    ],
)
def test_an_odd_reward_is_named(odd, told):
    with pytest.raises(SteersmanError, match=rf"^environment Odd, copy 0, episode 1, step 3: .*{told}"):
        played(odd)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_observation_that_is_not_finite_is_named(value):
    with pytest.raises(SteersmanError, match="environment Odd, copy 0, episode 1, step 3: the observation holds NaN"):
        played(1.0, observation=value)


@pytest.mark.parametrize("reward", [True, 2, np.float16(2.5), np.array(2.5), torch.tensor(2.5)])
def test_every_kind_of_number_is_taken(reward):
    assert played(reward).reward[0].tolist() == [1.0, 1.0, float(reward), 1.0]
