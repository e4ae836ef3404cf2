"""What an environment has opened is closed once, however its episode ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from train_kit import merge, recipe

from steersman.environments.check import play_episode
from steersman.environments.classes import from_class
from steersman.train.roles import build_roles
from steersman.types import Prompt, SteersmanError
from steersman.verbs.rl import _prompts

WORLDS = """
import threading, time

OPENED, CLOSED, GO = [], [], threading.Event()


class Holds:
    'Opens something as it is made.'

    def __init__(self, what="raise"):
        self.what = what
        OPENED.append(self)

    def begin(self, row):
        if self.what == "raise":
            raise RuntimeError("the page did not load")
        if self.what == "empty":
            return []
        if self.what == "first" and OPENED[0] is self:
            raise RuntimeError("the page did not load")
        if self.what in ("hang", "first"):
            GO.wait(60)
        return None

    def step(self, text):
        if self.what == "time":
            raise TimeoutError("no answer of the service")
        return "x", 1.0, True

    def close(self):
        CLOSED.append(self)
        if self.what == "hang":
            assert GO.is_set()
"""


@pytest.fixture
def holds(base, tmp_path):
    (tmp_path / "holds.py").write_text(WORLDS)
    return merge(
        base, {"environment": {"path": f"{tmp_path / 'holds.py'}:Holds", "max_turns": 3, "time_limit": 30.0}}
    )


def played(values, what=None, **extra):
    """The samples of two prompts, two episodes each, and the environment's module."""
    if what is not None:
        values = merge(values, {"environment.args": {"what": what}})
    made = recipe("rloo", values, **extra)
    roles = build_roles(made, torch.device("cpu"))
    train = _prompts(made, roles).train
    return roles, lambda: roles.generate(train[:2], seed=0, n=2)


def module(roles) -> dict:
    return roles.environment.kind.begin.__globals__


def soon(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def test_a_beginning_that_raises_is_closed_at_each_try(holds):
    roles, play = played(holds, "raise", environment__retries=2)
    for s in play():
        assert "the page did not load" in s.outcome
    world = module(roles)
    assert len(world["OPENED"]) == 12
    assert sorted(map(id, world["CLOSED"])) == sorted(map(id, world["OPENED"]))


def test_a_beginning_that_hangs_is_closed_by_its_thread_once_it_returns(holds):
    roles, play = played(holds, "hang", environment__time_limit=0.3)
    for s in play():
        assert "took longer than 0.3 s" in s.outcome
    world = module(roles)
    assert len(world["OPENED"]) == 4
    assert not world["CLOSED"]
    world["GO"].set()
    assert soon(lambda: len(world["CLOSED"]) == 4)


def test_a_run_that_stops_closes_what_is_beginning_and_begins_no_more(holds):
    roles, play = played(holds, "first", environment__on_fault="stop", environment__workers=1)
    with pytest.raises(SteersmanError, match="the page did not load"):
        play()
    world = module(roles)
    world["GO"].set()
    time.sleep(0.3)
    assert len(world["OPENED"]) <= 2  # the one thread may have been in the second beginning
    assert soon(lambda: sorted(map(id, world["CLOSED"])) == sorted(map(id, world["OPENED"])))


def test_an_error_of_time_in_a_step_is_told_as_it_is_and_the_episode_is_closed(holds):
    roles, play = played(holds, "time")
    for s in play():
        assert s.outcome.startswith("fault at turn 1: TimeoutError: no answer of the service (")
    world = module(roles)
    assert sorted(map(id, world["CLOSED"])) == sorted(map(id, world["OPENED"]))


def test_a_beginning_without_a_message_is_a_fault(holds):
    roles, play = played(holds, "empty", environment__retries=1)
    for s in play():
        assert s.outcome == "fault at its beginning: FaultError: begin gave no message"
    assert len(module(roles)["CLOSED"]) == 8
    with pytest.raises(SteersmanError, match="begin gave no message"):
        played(holds, "empty", environment__on_fault="stop")[1]()


def test_a_look_at_an_environment_tells_that_it_begins_with_no_message(holds):
    made = from_class(holds["environment"]["path"], {"what": "empty"}, "tell", 99)
    asked = Prompt([3], "", {}, 0, [{"role": "user", "content": "hm"}])
    assert play_episode(made, asked, 0, 2).fault == "begin gave no message"


def test_what_an_agent_program_left_behind_at_a_beginning_that_failed_is_ended(base, tmp_path):
    seconds = "4242.5"
    (tmp_path / "agent.py").write_text(
        f"import subprocess, sys\nsubprocess.Popen(['sleep', '{seconds}'])\nsys.exit(3)\n"
    )
    environment = {"agent": [sys.executable, str(tmp_path / "agent.py")], "max_turns": 3, "time_limit": 30.0}
    values = merge({**base, "environment": environment}, {"reward.parts": {"length": {"builtin": "length"}}})
    for s in played(values)[1]():
        assert "ended with exit code 3" in s.outcome

    def left() -> list[str]:
        found = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout
        return [line for line in found.splitlines() if f"sleep {seconds}" in line and not line.startswith("Z")]

    assert soon(lambda: not left(), 5.0), left()
