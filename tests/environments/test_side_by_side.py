"""Many episodes at once: slow tools wait side by side, hung ones are given up, and a resumed run goes on alike."""

from __future__ import annotations

import threading

import pytest
import torch
from train_kit import merge, plain, recipe, rows, weights

from steersman.environments.workers import TooLateError, Workers
from steersman.train.roles import build_roles
from steersman.verbs import rl
from steersman.verbs.rl import _prompts

WORLDS = """
import asyncio, threading, time

INSIDE, MET = [], threading.Event()


class Slow:
    def begin(self, row, seed=0):
        self.left, self.wait = 2, 0.05 + seed % 5 / 50
        return None

    def step(self, text):
        time.sleep(self.wait)
        self.left -= 1
        return "hm.", 1.0, self.left == 0


class Together:
    '''Its calls wait until eight are under way at once.'''

    def begin(self, row):
        return None

    def step(self, text):
        INSIDE.append(1)
        if len(INSIDE) >= 8:
            MET.set()
        if not MET.wait(60):
            raise RuntimeError("this call was alone")
        return "hm.", 1.0, True


class TogetherLater(Together):
    async def step(self, text):
        INSIDE.append(1)
        async with asyncio.timeout(60):
            while len(INSIDE) < 8:
                await asyncio.sleep(0.01)
        return "hm.", 1.0, True
"""


@pytest.fixture
def slow(base, tmp_path):
    (tmp_path / "slow.py").write_text(WORLDS)
    return merge(base, {"environment": {"path": f"{tmp_path / 'slow.py'}:Slow", "max_turns": 5, "time_limit": 120}})


def generate(values, n=8, **extra):
    made = recipe("rloo", values, **extra)
    roles = build_roles(made, torch.device("cpu"))
    train = _prompts(made, roles).train
    return roles.generate(train[:4], seed=0, n=n)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("world", ["Together", "TogetherLater"])
def test_waiting_tools_wait_beside_each_other(slow, world, overlap):
    path = slow["environment"]["path"].replace(":Slow", f":{world}")
    samples = generate(merge(slow, {"environment.path": path}), environment__overlap=overlap)
    assert {(s.outcome, len(s.turns)) for s in samples} == {("done", 1)}


def test_overlap_gives_the_same_episodes(slow):
    assert [s.ids for s in generate(slow)] == [s.ids for s in generate(slow, environment__overlap=True)]


def test_a_hung_call_is_given_up_and_its_thread_replaced():
    workers, stop, closed, failed = Workers(1), *(threading.Event() for _ in range(3))
    workers.submit(0, stop.wait, 0.1, "the first call", closed.set)
    workers.submit(1, lambda: 7, 0.1, "the second call", failed.set)
    done = {job.key: job for job in [*workers.take(True), *workers.take(True)]}
    assert isinstance(done[0].error, TooLateError)
    assert done[1].result == 7
    assert workers.abandoned == 1
    assert not closed.is_set()  # what a thread still uses is not closed beside it
    stop.set()
    assert closed.wait(20)
    assert not failed.is_set()
    workers.close()


def test_an_error_of_time_that_a_call_raises_itself_is_its_own():
    """What sockets, urllib and asyncio raise; the call is over, and nothing of it is held by a thread any more."""

    def timed_out():
        raise TimeoutError("no answer of the service")

    workers, closed = Workers(1), threading.Event()
    workers.submit(0, timed_out, 20.0, "the call", closed.set)
    (job,) = workers.take(True)
    assert isinstance(job.error, TimeoutError)
    assert not isinstance(job.error, TooLateError)
    assert not closed.is_set()
    workers.close()


def test_pools_that_end_begin_nothing_that_waits_and_drop_what_runs():
    workers, inside, stop, closed, began = Workers(1), *(threading.Event() for _ in range(4))
    workers.submit(0, lambda: (inside.set(), stop.wait(60)), None, "the first call", closed.set)
    workers.submit(1, began.set, None, "the second call", lambda: None)
    assert inside.wait(20)
    workers.close()
    stop.set()
    assert closed.wait(20)
    assert not began.wait(0.3)


def test_a_resumed_run_is_the_run_that_was_not_stopped(base, tmp_path):
    """Checkpoints at every iteration; what comes after one is sampled from the same seeds."""
    whole = recipe("ppo", base, iterations=4, run__dir=str(tmp_path / "whole"))
    rl.run(whole)
    half = recipe("ppo", base, iterations=2, run__dir=str(tmp_path / "half"))
    rl.run(half)
    rl.run(recipe("ppo", base, iterations=4, run__dir=str(tmp_path / "half")), resume=True)
    a, b = (weights(tmp_path / name / "model") for name in ("whole", "half"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert plain(rows(tmp_path / "whole")[-1]) == plain(rows(tmp_path / "half")[-1])
