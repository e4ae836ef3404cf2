"""How good a policy is, on episodes that it did not learn from, and what it looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steersman.control.envs import Worlds, maker
from steersman.control.experience import collect_episodes
from steersman.control.recipe import ControlRecipe
from steersman.run.seed import stream
from steersman.types import Stats, SteersmanError

WIDTH, FRAMES = 320, 250
"""Pixels across, and about the most frames, of a GIF: a longer episode shows every second or third frame."""


class Agent(Protocol):
    """What a finished run can do."""

    def greedy(self, obs: Tensor) -> Tensor: ...

    def sampled(self, obs: Tensor, generator: torch.Generator) -> Tensor: ...


def evaluate(agent: Agent, make: Callable[[], gym.Env], recipe: ControlRecipe, episodes: int) -> Stats:
    """Mean, deviation and extremes of the undiscounted return over whole episodes, the same ones every time."""
    worlds = Worlds(make, min(episodes, 20), recipe.run.seed, "evaluation")
    seen = collect_episodes(worlds, _acting(agent, recipe), episodes)
    worlds.close()
    returns = torch.tensor(seen.returns, dtype=torch.float64)
    return {
        "held_out/return": float(returns.mean()),
        "held_out/return_std": float(returns.std(correction=0)),
        "held_out/return_min": float(returns.min()),
        "held_out/return_max": float(returns.max()),
        "held_out/length": sum(seen.lengths) / len(seen.lengths),
    }


class Video:
    """One episode as an animated GIF. The environment is built anew, to draw, and a first picture is taken at once.

    Raises SteersmanError where it gives none, or the file's folder can not be made.
    """

    def __init__(self, recipe: ControlRecipe, path: Path) -> None:
        self.recipe, self.path = recipe, path
        self.make = maker(recipe.env, recipe.env_options, render=True)
        worlds = self._worlds()
        _picture(worlds.vector.envs[0])
        worlds.close()
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)

    def record(self, agent: Agent) -> int:
        """Writes the file; returns its number of frames. Raises SteersmanError where it can not be written."""
        worlds = self._worlds()
        act, env = _acting(agent, self.recipe), worlds.vector.envs[0]
        frames, over = [_picture(env)], False
        while not over:
            with torch.no_grad():
                _, _, terminated, truncated = worlds.step(act(worlds.obs))
            frames.append(_picture(env))
            over = bool(terminated[0] or truncated[0])
        every = -(-len(frames) // FRAMES)
        rate: Any = env.metadata.get("render_fps", 30)
        worlds.close()
        # browsers play what asks for less than 20 ms per frame slowly
        duration = max(20, round(1000 * every / rate))
        with self._writing():
            frames[0].save(self.path, save_all=True, append_images=frames[every::every], duration=duration, loop=0)
        return len(frames[::every])

    def _worlds(self) -> Worlds:
        return Worlds(self.make, 1, self.recipe.run.seed, "video")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            if self.path.is_dir():
                raise IsADirectoryError("it is a folder")
            yield
        except OSError as error:
            raise SteersmanError(f"video {self.path}: it can not be written ({error}); name another place") from error


def _acting(agent: Agent, recipe: ControlRecipe) -> Callable[[Tensor], Tensor]:
    if recipe.evaluation.greedy:
        return agent.greedy
    generator = stream(recipe.run.seed, "evaluation")
    return lambda obs: agent.sampled(obs, generator)


def _picture(env: gym.Env) -> Image.Image:
    try:
        frame: Any = env.render()
    except NotImplementedError:
        frame = None
    if not isinstance(frame, np.ndarray) or frame.ndim != 3:
        raise SteersmanError("video: this environment renders no pictures (render_mode rgb_array); leave video out")
    image = Image.fromarray(frame)
    height = round(image.height * WIDTH / image.width)
    return image.resize((WIDTH, height)).quantize(64)
