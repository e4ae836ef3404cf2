"""A policy that never ends its episode: a look at it ends, says so, and leaves in order when a signal asks."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image

from steersman.cli import main
from steersman.config.load import load_recipe
from steersman.control import experience
from steersman.control.envs import Worlds
from steersman.control.evaluate import Video
from steersman.control.experience import collect_episodes, play_episodes
from steersman.control.recipe import recipe_class
from steersman.types import SteersmanError

ENDLESS = """
import os
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np


class Endless(gym.Env):
    '''Pays -1 a step. Where the file `bell` is, its first episode of more than `late` steps asks to stop.'''

    observation_space, action_space = gym.spaces.Discrete(4), gym.spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, bell="", late=500, render_mode=None):
        self.bell, self.late, self.render_mode = bell, late, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return 0, {}

    def step(self, action):
        self.t += 1
        if self.t > self.late and self.bell and Path(self.bell).exists():
            Path(self.bell).unlink()
            os.kill(os.getpid(), signal.SIGTERM)
        return self.t % 4, -1.0, False, False, {}

    def render(self):
        return np.full((4, 320, 3), self.t % 256, np.uint8)
"""


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text(ENDLESS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experience, "CUT", 1000)
    return tmp_path


def words(name: str, *more: str) -> list[str]:
    small = ["--iterations", "4", "--evaluation.episodes", "2", "--evaluation.during", "2", "--run.eval_every", "2"]
    if name == "dqn":
        small += ["--settings.learning_starts", "32", "--settings.updates", "2"]
    small += ["--rollout.copies", "2", "--rollout.steps", "32", "--network.hidden", "[8]"]
    return ["control", "--env", "endless.py:Endless", "--algorithm", name, *small, "--run.dir", "run", *more]


@pytest.mark.parametrize("name", ["dqn", "ppo"])
def test_a_look_cuts_an_episode_without_an_end_and_says_so(name, world, capsys):
    assert main(words(name)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "longest episode of a look 1,000 steps, since the environment names no limit" in said
    assert "100% of 2 episodes had no end and were cut" in said
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert (summary["held_out/return"], summary["held_out/length"], summary["held_out/cut"]) == (-1000, 1000, 1.0)
    rows = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("held_out/cut") for row in rows] == [None, 1.0, None, 1.0]


@pytest.mark.parametrize(("every", "step"), [("2", 2), ("100", 4)])
def test_a_signal_ends_a_look_and_the_run_goes_on_later(every, step, world):
    (world / "bell").touch()
    asked = words("ppo", "--env_options.bell", "bell", "--run.eval_every", every)
    assert main(asked) == 130
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert (summary["finished"], summary["steps"]) == (False, step)
    assert "held_out/return" not in summary
    assert main([*asked, "--resume"]) == 0
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert (summary["finished"], summary["steps"], summary["held_out/cut"]) == (True, 4, 1.0)


def test_a_signal_ends_tabular_learning_of_an_episode_without_an_end(world):
    (world / "bell").touch()
    asked = ["control", "--env", "endless.py:Endless", "--env_options.bell", "bell", "--algorithm", "q-learning"]
    assert main([*asked, "--run.dir", "run"]) == 130
    assert not json.loads((world / "run" / "summary.json").read_text())["finished"]


class Idle:
    def greedy(self, obs):
        return torch.zeros(len(obs), dtype=torch.int64)

    def sampled(self, obs, generator):
        return self.greedy(obs)


def test_a_video_of_an_episode_without_an_end_is_cut_thinned_and_not_made_when_a_signal_asks(world, monkeypatch):
    monkeypatch.setattr(experience, "CUT", 2100)
    given = words("ppo", "--video", "out.gif")[1:]
    video = Video(load_recipe(recipe_class(None, given), None, given), world / "out.gif")
    assert "signal asked to stop" in video.record(Idle(), lambda: True)
    assert not (world / "out.gif").exists()
    told = video.record(Idle())
    picture = Image.open(world / "out.gif")
    assert told == f"{picture.n_frames} frames of the first 2,100 steps of an episode without an end"
    assert 120 < picture.n_frames <= 250


class Lengths(gym.Env):
    """Episodes of 1 to `most` steps, or without an end where `most` is 0."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32), spaces.Discrete(2)

    def __init__(self, most: int) -> None:
        self.most = most

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.end = 0, int(self.np_random.integers(1, self.most + 1)) if self.most else -1
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), 1.0 / self.t, self.t == self.end, False, {}


@pytest.mark.parametrize(("copies", "episodes"), [(3, 7), (4, 2), (1, 3)])
def test_a_look_takes_the_same_episodes_as_training_would(copies, episodes):
    learned = collect_episodes(Worlds(lambda: Lengths(9), copies, 0, "a"), Idle().greedy, episodes)
    looked = play_episodes(Worlds(lambda: Lengths(9), copies, 0, "a"), Idle().greedy, episodes, lambda: False)
    assert (looked.returns, looked.lengths, looked.cut) == (learned.returns, learned.lengths, 0)


def test_long_episodes_are_cut_and_short_ones_are_not(monkeypatch):
    monkeypatch.setattr(experience, "CUT", 5)
    looked = play_episodes(Worlds(lambda: Lengths(9), 3, 0, "a"), Idle().greedy, 12, lambda: False)
    assert len(looked.lengths) == 12
    assert max(looked.lengths) == 5
    assert 0 < looked.cut < looked.lengths.count(5) + 1 < 12
    assert looked.returns == pytest.approx([sum(1 / t for t in range(1, n + 1)) for n in looked.lengths])


def test_whole_episodes_to_learn_from_have_a_longest_each(monkeypatch):
    monkeypatch.setattr(experience, "LONGEST", 50)
    assert max(collect_episodes(Worlds(lambda: Lengths(50), 1, 0), Idle().greedy, 20).lengths) > 40
    with pytest.raises(SteersmanError, match=r"no end after 50 steps.*set it to null.*max_episode_steps"):
        collect_episodes(Worlds(lambda: Lengths(0), 3, 0), Idle().greedy, 20)
