"""How good a policy is, on episodes that it did not learn from, and what it looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steersman.control.envs import Worlds
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


def record(agent: Agent, make: Callable[[], gym.Env], recipe: ControlRecipe, path: Path) -> int:
    """Writes one episode as an animated GIF; returns its number of frames.

    `make` must build the environment with render_mode "rgb_array". Raises SteersmanError where it gives no pictures
    or the file can not be written.
    """
    worlds = Worlds(make, 1, recipe.run.seed, "video")
    act, env = _acting(agent, recipe), worlds.vector.envs[0]
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(path, save_all=True, append_images=frames[every::every], duration=duration, loop=0)
    except (OSError, ValueError) as error:
        raise SteersmanError(f"video {path}: it can not be written ({error}); name a .gif file") from error
    return len(frames[::every])


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
