"""Gymnasium environments side by side.

Every episode of every copy has a seed of its own, derived from the run's seed, so an environment's state is known
by that seed and the actions since: a checkpoint holds those and a resumed run plays them again. That is exact for
any environment that is deterministic given its seed, physics engines included, and needs nothing from it.

Autoreset is off: a step that ends an episode returns that episode's own last observation, which a truncated one
bootstraps from, and the new episode begins with a reset that is asked for. There are no phantom steps between two
episodes and no final observations hidden in `info`.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from jaxtyping import Float
from torch import Tensor

from steersman.control.checked import Checked
from steersman.guards.functions import load_function
from steersman.run.seed import sub_seed
from steersman.types import SteersmanError

RESOLUTION = torch.finfo(torch.float32).eps


class Normaliser:
    """(x - mean) / std of all observations that it was shown, held within +-`bound`; the identity before that.

    One that never changed is 0: sums are in float64, and a deviation below float32's resolution of the mean is none.
    Source of the update: Chan, Golub and LeVeque 1979, parallel variance.
    """

    def __init__(self, size: int, bound: float = 10.0) -> None:
        self.mean, self.square, self.count = *torch.zeros(2, size, dtype=torch.float64), 0
        self.bound = bound

    def __call__(self, obs: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead D"]:
        if self.count < 2:
            return obs
        least = (RESOLUTION * self.mean.abs()).clamp(min=1e-6)
        std = torch.maximum((self.square / self.count).sqrt(), least)
        return ((obs - self.mean) / std).clamp(-self.bound, self.bound).to(obs.dtype)

    def update(self, obs: Float[Tensor, "M D"]) -> None:
        obs, count = obs.double(), self.count + len(obs)
        delta = obs.mean(0) - self.mean
        self.square = self.square + obs.var(0, correction=0) * len(obs) + delta**2 * self.count * len(obs) / count
        self.mean = self.mean + delta * len(obs) / count
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "square": self.square, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.square, self.count = state["mean"].double(), state["square"].double(), state["count"]


class Worlds:
    """`count` copies of one environment.

    `make` builds one copy; `seed` is the root of all episodes' seeds, `names` tells uses of one seed apart.
    Observations come out as float32 [N, D]: boxes flattened, discrete ones one-hot. Continuous actions are taken in
    units of the action box, -1 to 1, and clipped to it; where the box has no bounds, as they are.

    `returns` and `steps` are of the episodes under way. `own_limit` is the most steps of an episode that the
    environment names, None where it names none; `time_limit` is then taken to be 1000.

    Raises SteersmanError for observation or action spaces that no method here takes, and for steps as `Checked` does.
    """

    def __init__(self, make: Callable[[], gym.Env], count: int, seed: int, *names: str) -> None:
        copies = [partial(_checked, make, i) for i in range(count)]
        self.vector = SyncVectorEnv(copies, autoreset_mode=AutoresetMode.DISABLED)
        self.count, self.seed, self.names = count, seed, names
        self.observation_space, self.action_space = (
            self.vector.single_observation_space,
            self.vector.single_action_space,
        )
        self.obs_size = observation_size(self.observation_space)
        self.actions = action_size(self.action_space)
        spec = self.vector.envs[0].spec
        self.own_limit = None if spec is None else spec.max_episode_steps
        self.time_limit = self.own_limit or 1000
        self.episode = [-1] * count
        self.history: list[list[np.ndarray]] = [[] for _ in range(count)]
        self.returns, self.steps = np.zeros(count), np.zeros(count, dtype=np.int64)
        self.obs = self.begin(np.ones(count, dtype=bool))

    def begin(self, which: np.ndarray) -> Tensor:
        """Starts a new episode in the copies where `which` is True; returns the observations of all."""
        if not which.any():
            return self.obs
        for i in np.flatnonzero(which):
            self.episode[i] += 1
            self.history[i], self.returns[i], self.steps[i] = [], 0.0, 0
        raw, _ = self.vector.reset(
            seed=[self._seed(i) for i in range(self.count)], options={"reset_mask": which.copy()}
        )
        self.obs = self._flat(raw)
        return self.obs

    def step(self, action: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """(observations, rewards, terminated, truncated); a copy that ended must be begun anew before the next."""
        given = self._given(action)
        raw, reward, terminated, truncated, _ = self.vector.step(given)
        for i, history in enumerate(self.history):
            history.append(given[i])
        self.returns += reward
        self.steps += 1
        self.obs = self._flat(raw)
        return self.obs, reward, terminated, truncated & ~terminated

    def close(self) -> None:
        self.vector.close()

    def state_dict(self) -> dict[str, Any]:
        return {"episode": list(self.episode), "history": [torch.from_numpy(np.array(h)) for h in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Plays the episodes that were under way again, from their seeds, to where they stood."""
        self.episode = [e - 1 for e in state["episode"]]
        self.begin(np.ones(self.count, dtype=bool))
        obs = self.obs.clone()
        for i, (env, actions) in enumerate(zip(self.vector.envs, state["history"], strict=True)):
            for action in actions.numpy():
                raw, reward, *_ = env.step(action)
                self.history[i].append(action)
                self.returns[i] += float(reward)
                self.steps[i] += 1
                obs[i] = self._flat(np.asarray(raw)[None])[0]
        self.obs = obs

    def _seed(self, i: int) -> int:
        return sub_seed(self.seed, *self.names, "episode", i, self.episode[i])

    def _flat(self, raw: np.ndarray) -> Tensor:
        if isinstance(self.observation_space, spaces.Discrete):
            index = torch.from_numpy(raw.astype(np.int64)) - int(self.observation_space.start)
            return torch.nn.functional.one_hot(index, self.obs_size).float()
        return torch.from_numpy(raw.reshape(len(raw), -1).astype(np.float32))

    def _given(self, action: Tensor) -> np.ndarray:
        """The action as the environment takes it."""
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return action.cpu().numpy() + int(space.start)
        assert isinstance(space, spaces.Box)
        raw = action.cpu().numpy().reshape(len(action), *space.shape)
        bounded = np.isfinite(space.low) & np.isfinite(space.high)
        low, high = np.where(bounded, space.low, -1.0), np.where(bounded, space.high, 1.0)
        scaled = np.where(bounded, low + (np.clip(raw, -1, 1) + 1) / 2 * (high - low), raw)
        return np.clip(scaled, space.low, space.high).astype(space.dtype)


def _checked(make: Callable[[], gym.Env], copy: int) -> gym.Env:
    return Checked(make(), copy)


def maker(name: str, options: dict[str, Any], *, render: bool = False) -> Callable[[], gym.Env]:
    """A function that builds the environment by name; builds one at once, so that what is wrong shows now.

    "my_env.py:Class" gives an environment of one's own, built with the options.

    Raises SteersmanError for a name that Gymnasium does not know, options that it refuses, or a missing package.
    """
    extra, how = (options, "")
    if render:
        extra, how = {**options, "render_mode": "rgb_array"}, " with render_mode rgb_array, which `video` needs"
    if ".py:" in name:
        return _own(name, load_function(name), extra, how)
    try:
        gym.make(name, **extra).close()
    except gym.error.DependencyNotInstalled as error:
        box2d = "; pip install 'steersman[box2d]'" if "box2d" in str(error).lower() else ""
        raise SteersmanError(f"env {name}: a package that it needs is missing ({error}){box2d}") from error
    except (gym.error.Error, TypeError, ModuleNotFoundError) as error:
        near = get_close_matches(name, list(gym.registry), 1)
        hint = f"; did you mean {near[0]}?" if near and near[0] != name else ""
        raise SteersmanError(f"env {name}: Gymnasium can not make it{how} ({error}){hint}") from error
    return lambda: gym.make(name, **extra)


def _own(name: str, build: Callable[..., Any], options: dict[str, Any], how: str) -> Callable[[], gym.Env]:
    """The maker of a user's environment; what it does not say itself (a limit of time) is not added."""
    try:
        made = build(**options)
    except Exception as error:
        raise SteersmanError(f"env {name}: it can not be made{how} ({type(error).__name__}: {error})") from error
    if not isinstance(made, gym.Env):
        raise SteersmanError(f"env {name}: {type(made).__name__} is no gymnasium.Env; derive the class from it")
    made.close()
    return lambda: build(**options)


def observation_size(space: spaces.Space) -> int:
    """Numbers in one flattened observation."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.Box):
        return int(np.prod(space.shape))
    raise SteersmanError(
        f"the observation space {space} can not be taken: multilayer perceptrons take Box and Discrete; wrap the "
        "environment in gymnasium.wrappers.FlattenObservation"
    )


def action_size(space: spaces.Space) -> int:
    """Number of choices of a Discrete space, of dimensions of a Box."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return int(np.prod(space.shape))
    raise SteersmanError(
        f"the action space {space} can not be taken: policies here act in Discrete or float Box spaces"
    )
