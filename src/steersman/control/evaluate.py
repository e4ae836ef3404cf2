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
from steersman.control.experience import longest, play_episodes
from steersman.control.recipe import ControlRecipe
from steersman.run.seed import stream
from steersman.types import Stats, SteersmanError

WIDTH, FRAMES = 320, 250
"""Pixels across, and the most frames, of a GIF: a longer episode shows every second or third frame."""
SECONDS = 120
"""How long a GIF plays at most: an episode that took longer is shown faster."""
HELD = 4 * FRAMES
"""The most pictures in memory while an episode is recorded; beyond them every second one goes."""


class Agent(Protocol):
    """What a finished run can do."""

    def greedy(self, obs: Tensor) -> Tensor: ...

    def sampled(self, obs: Tensor, generator: torch.Generator) -> Tensor: ...


def never() -> bool:
    """Nobody asks to stop."""
    return False


def evaluate(
    agent: Agent,
    make: Callable[[], gym.Env],
    recipe: ControlRecipe,
    episodes: int,
    *,
    stopping: Callable[[], bool] = never,
) -> Stats:
    """Mean, deviation and extremes of the undiscounted return over whole episodes, the same ones every time.

    An episode without an end is cut (`longest` says where) and counts as far as it went; `held_out/cut` is the share
    of these. Once `stopping` says so, nothing is measured and there are no numbers.
    """
    worlds = Worlds(make, min(episodes, 20), recipe.run.seed, "evaluation")
    seen = play_episodes(worlds, _acting(agent, recipe), episodes, stopping)
    worlds.close()
    if seen is None:
        return {}
    returns = torch.tensor(seen.returns, dtype=torch.float64)
    return {
        "held_out/return": float(returns.mean()),
        "held_out/return_std": float(returns.std(correction=0)),
        "held_out/return_min": float(returns.min()),
        "held_out/return_max": float(returns.max()),
        "held_out/length": sum(seen.lengths) / len(seen.lengths),
        "held_out/cut": seen.cut / len(seen.lengths),
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

    def record(self, agent: Agent, stopping: Callable[[], bool] = never) -> str:
        """Writes the file; returns what it shows. An episode without an end is cut as `evaluate` cuts it. Once
        `stopping` says so, nothing is written.

        Raises SteersmanError where the file can not be written.
        """
        worlds = self._worlds()
        act, env = _acting(agent, self.recipe), worlds.vector.envs[0]
        frames, every, over, limit = [_picture(env)], 1, False, longest(worlds)
        while not over and worlds.steps[0] < limit:
            if stopping():
                worlds.close()
                return "not written, since a signal asked to stop; --resume records it"
            with torch.no_grad():
                _, _, terminated, truncated = worlds.step(act(worlds.obs))
            over = bool(terminated[0] or truncated[0])
            if worlds.steps[0] % every == 0:
                frames.append(_picture(env))
            if len(frames) > HELD:
                frames, every = frames[::2], 2 * every
        steps = int(worlds.steps[0])
        rate: Any = env.metadata.get("render_fps", 30)
        worlds.close()
        thinner = -(-len(frames) // FRAMES)
        shown = frames[::thinner]
        # browsers play what asks for less than 20 ms per frame slowly
        duration = max(20, round(1000 * min(every * thinner / rate, SECONDS / len(shown))))
        with self._writing():
            shown[0].save(self.path, save_all=True, append_images=shown[1:], duration=duration, loop=0)
        of = "" if over else f" of the first {steps:,} steps of an episode without an end"
        return f"{len(shown)} frames{of}"

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
