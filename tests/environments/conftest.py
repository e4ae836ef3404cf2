"""A tiny model's folder and settings of a run of episodes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from letter_models import save_mini
from train_kit import merge, settings

from steersman.train import session

WORLDS = '''
import asyncio, os, random, sys, time


class Shop:
    """A shop with one purse."""

    def reset(self, coins: int = 3, **row) -> str | None:
        self.coins, self.bought, self.done = coins, [], False
        return f" you have {coins}"

    def buy(self, item: str, count: int = 1) -> str:
        """Buys something.

        Args:
            item: what to buy
            count: how many
        """
        if count > self.coins:
            raise ValueError("not enough coins")
        self.coins -= count
        self.bought += [item] * count
        return f"bought {item}"

    def get_reward(self) -> float:
        return float(len(self.bought))


class Echo:
    """Says how often a was said; three turns; pays for every a."""

    def begin(self, row, seed=0):
        self.left, self.luck = 3, random.Random(seed)
        return None

    def step(self, text):
        self.left -= 1
        word = self.luck.choice(["more.", "go on,", "oh!"])
        return word, text.count("a") / 4, self.left == 0


class Misbehaves:
    """Does `what` at its second turn."""

    def __init__(self, what="raise"):
        self.what, self.turn = what, 0

    def begin(self, row):
        if self.what == "begin":
            raise RuntimeError("no board")
        return "x" * 5000 if self.what == "long" else None

    def step(self, text):
        self.turn += 1
        if self.turn < 2 or self.what == "endless":
            return "hm.", 0.5, False
        if self.what == "raise":
            raise RuntimeError("broken \\x1b[31m")
        if self.what == "hang":
            time.sleep(3)
        if self.what == "exit":
            raise SystemExit(3)
        if self.what == "leave":
            os._exit(3)
        if self.what == "close":
            os.close(1)
            sys.stdout.close()
            return "a", 0.0, True
        return {
            "nan": ("a", float("nan"), True), "none": ("a", None, True), "two": ("a", 1.0), "number": 5,
            "megabyte": ("b" * 1_000_000, 0.0, False), "control": ("\\x1b[2J\\ud800", 0.0, False),
            "object": (object(), 0.0, False), "role": ([{"role": "boss", "content": "x"}], 0.0, False),
        }[self.what]


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


async def slow_add(a: int, b: int) -> int:
    """Adds two numbers, later.

    Args:
        a: the first
        b: the second
    """
    await asyncio.sleep(0.01)
    return a + b
'''


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(session, "write_report", lambda folder: folder / "report.html")


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """The smallest model, with room for an episode; tests only read it."""
    return save_mini(tmp_path_factory.mktemp("mini"), context=1024)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory) -> Path:
    """A file of environments and tools."""
    path = tmp_path_factory.mktemp("worlds") / "worlds.py"
    path.write_text(WORLDS)
    return path


@pytest.fixture
def base(tmp_path, mini, worlds):
    """Settings of a run in class Echo: 4 prompts, 2 episodes each, 6 tokens a turn."""
    return merge(
        settings(tmp_path, mini),
        {
            "reward.parts": {"play": {"environment": "turn"}},
            "environment": {"path": f"{worlds}:Echo", "max_turns": 5},
            "rollout.max_new_tokens": 6,
        },
    )
