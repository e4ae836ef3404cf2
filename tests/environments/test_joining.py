"""Turns that join the running batch: the same bits whatever environments take, in fewer rows than episodes."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from train_kit import merge, recipe

from steersman.environments import schedules
from steersman.rollout.sampling import Sampling
from steersman.train.roles import build_roles
from steersman.types import Prompt, SteersmanError
from steersman.verbs.rl import _prompts

WAITS = """
import random, time

class Waits:
    def __init__(self, longest=0.0, luck=0):
        self.longest, self.luck = longest, random.Random(luck)

    def begin(self, row, seed=0):
        self.left = 1 + seed % 4
        time.sleep(self.luck.random() * self.longest)
        return None

    def step(self, text):
        time.sleep(self.luck.random() * self.longest)
        self.left -= 1
        return "hm.", 1.0, self.left == 0
"""


@pytest.fixture
def waits(base, tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    return merge(
        base,
        {
            "environment": {"path": f"{tmp_path / 'waits.py'}:Waits", "max_turns": 5, "overlap": True},
            "rollout.max_batch": 5,
        },
    )


def episodes(values, n=6, **extra):
    made = recipe("rloo", values, **extra)
    roles = build_roles(made, torch.device("cpu"))
    train = _prompts(made, roles).train
    return roles.generate(train[:4], seed=(3,), n=n)


def bits(samples):
    return [(s.ids, s.logp, s.mask, s.outcome, [t.observation for t in s.turns]) for s in samples]


def test_how_long_environments_take_changes_no_bit(waits):
    at_once = bits(episodes(waits))
    for luck in (1, 2):
        late = merge(waits, {"environment.args": {"longest": 0.05, "luck": luck}})
        assert bits(episodes(late)) == at_once


def test_steps_between_turns_change_no_bit_and_are_kept(waits, monkeypatch):
    """An episode speaks again after so many steps, or sooner where nothing else is decoded; never by the clock."""
    waits = merge(waits, {"environment.overlap_steps": 9})
    at_once = bits(episodes(waits))
    steps, ended, gaps, joining = [0], {}, [], schedules.joining

    class Watched:
        def __init__(self, batch):
            self.batch, self.keys = batch, {}

        room = property(lambda self: self.batch.room)
        busy = property(lambda self: self.batch.busy)

        def join(self, asked, seeds):
            gaps.extend(steps[0] - ended[p.index] for p in asked if p.index in ended and self.busy)
            numbers = self.batch.join(asked, seeds)
            self.keys |= {n: p.index for n, p in zip(numbers, asked, strict=True)}
            return numbers

        def advance(self):
            steps[0] += 1
            done = self.batch.advance()
            ended.update({self.keys[n]: steps[0] for n in done})
            return done

    monkeypatch.setattr("steersman.environments.runner.joining", lambda play, b: joining(play, Watched(b)))
    late = merge(waits, {"environment.args": {"longest": 0.05, "luck": 1}})
    assert bits(episodes(late)) == at_once
    assert len(gaps) > 10
    assert min(gaps) >= 9
    with pytest.raises(ValidationError, match="overlap_steps belongs to overlap"):
        recipe("rloo", merge(waits, {"environment.overlap": False}))


def test_the_same_words_as_turn_by_turn(waits):
    joined, in_step = episodes(waits), episodes(merge(waits, {"environment.overlap": False}))
    assert [s.ids for s in joined] == [s.ids for s in in_step]
    for a, b in zip(joined, in_step, strict=True):
        assert a.logp == pytest.approx(b.logp, abs=1e-5)


def test_support_and_an_episode_that_never_begins(waits):
    short = merge(waits, {"rollout.top_k": 3})
    for s in episodes(short):
        assert len(s.support) == len(s.ids)
        assert all(i in allowed.tolist() for i, allowed in zip(s.ids, s.support, strict=True))
    broken = merge(waits, {"environment.args": {"longest": "no number"}})
    assert {s.outcome.split(":")[0] for s in episodes(broken)} == {"fault at its beginning"}


def test_a_turn_that_waits_holds_no_row(waits, monkeypatch):
    """With twice as many episodes as rows all rows stay in use until the last episodes."""
    seen = []

    class Watched:
        def __init__(self, batch):
            self.batch = batch

        room = property(lambda self: self.batch.room)
        busy = property(lambda self: self.batch.busy)

        def join(self, *asked):
            return self.batch.join(*asked)

        def advance(self):
            done = self.batch.advance()
            seen.append(len(self.batch.batch.live) + len(done))
            return done

    joining = schedules.joining
    monkeypatch.setattr("steersman.environments.runner.joining", lambda play, b: joining(play, Watched(b)))
    episodes(merge(waits, {"environment.args": {"longest": 0.02}}), n=10)
    busiest = seen[: len(seen) * 3 // 4]
    assert max(seen) == 5
    assert sum(busiest) / len(busiest) > 4.5


def test_the_batch_is_its_callers_alone(waits):
    made = recipe("rloo", waits)
    engine = build_roles(made, torch.device("cpu")).engine.generator
    room = {"rows": 2, "longest": 40, "sequences": 4, "record_support": False}
    with engine.joinable(Sampling(4), **room) as batch:
        assert batch.room == 2
        numbers = batch.join([Prompt([3, 4], "", {}, 0), Prompt([3, 4], "", {}, 1)], [(1,), (1,)])
        with pytest.raises(SteersmanError, match="another thread"):
            engine.generate([Prompt([3], "")], Sampling(4))
        done = {}
        while batch.busy:
            done |= batch.advance()
    assert sorted(done) == numbers
    assert [done[k].prompt.index for k in numbers] == [0, 1]
    alone = engine.generate([Prompt([3, 4], "", {}, 1)], Sampling(4), seed=(1,))
    assert alone[0].ids == done[numbers[1]].ids
