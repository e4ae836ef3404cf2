"""A run ends when a held-out judge finds nothing better or its KL is spent, and leaves its best weights."""

from __future__ import annotations

import math

import pytest
import torch
from train_kit import merge, plain, recipe, rows, weights

from steersman.recipe.stopping import StopConfig
from steersman.train.stopping import Stopping
from steersman.verbs import rl


def looks(config, *values):
    made, ended = Stopping(config), []
    for value, kl in values:
        made.add(value, kl)
        ended.append(made.reason)
    return made, ended


def test_patience_counts_looks_without_a_new_best():
    made, ended = looks(StopConfig(judge="j"), (1.0, 0), (2.0, 1), (2.0, 1), (1.5, 2))
    assert made.best == 1
    assert ended == [None, None, None, "j has found nothing better for 2 looks"]


def test_a_look_beyond_the_budget_ends_it_and_is_not_the_best():
    made, ended = looks(StopConfig(judge="j", max_kl=3), (1.0, 0), (2.0, 3), (9.0, 3.1))
    assert made.best == 1
    assert ended[1] is None
    assert ended[2] == "KL is beyond the budget of 3 nats"


def test_without_a_section_nothing_ends_and_the_last_look_counts():
    made, ended = looks(None, (2.0, 0), (1.0, 50))
    assert made.best == 1
    assert ended == [None, None]


@pytest.fixture
def judged(base, tmp_path):
    """Training toward the letter a, with a judge that wants anything else."""
    file = tmp_path / "judges.py"
    file.write_text("def less(prompts, completions):\n    return [-c.count('a') for c in completions]\n")
    return merge(
        base,
        {
            "reward.parts.other": {"function": f"{file}:less", "weight": 0.0}, "iterations": 8, "run.eval_every": 1,
            "stop": {"judge": "other", "patience": 2}, "optimizer.lr": 0.03, "rollout.held_out": 8,
        },
    )  # fmt: skip


def test_the_saved_model_is_that_of_the_judges_best_look(judged, tmp_path):
    summary = rl.run(recipe("rloo", judged))
    seen = [r for r in rows(tmp_path / "run") if "held_out/judge" in r]
    assert summary["finished"]
    assert len(seen) < 9
    best = max(seen, key=lambda r: (r["held_out/judge"], -r["step"]))
    assert len(seen) == best["step"] + 3
    assert summary["reward/other_after"] == best["held_out/judge"]
    shorter = merge(judged, {"run.dir": str(tmp_path / "shorter"), "iterations": max(best["step"], 1), "stop": None})
    rl.run(recipe("rloo", shorter))
    found, wanted = weights(tmp_path / "run" / "model"), weights(tmp_path / "shorter" / "model")
    same = all(torch.equal(found[k], wanted[k]) for k in found)
    assert same or best["step"] == 0


def test_a_run_that_was_killed_ends_where_it_would_have(judged, tmp_path, monkeypatch):
    rl.run(recipe("rloo", judged))
    cut = merge(judged, {"run.dir": str(tmp_path / "cut")})
    with monkeypatch.context() as patch:
        patch.setattr("steersman.verbs.rl.RewardLooks.look", broken_after(2))
        with pytest.raises(KeyboardInterrupt):
            rl.run(recipe("rloo", cut))
    rl.run(recipe("rloo", cut), resume=True)
    whole, again = rows(tmp_path / "run"), rows(tmp_path / "cut")
    assert [plain(r) for r in whole] == [plain(r) for r in again]
    a, b = weights(tmp_path / "run" / "model"), weights(tmp_path / "cut" / "model")
    assert all(torch.equal(a[k], b[k]) for k in a)


def broken_after(calls):
    real, left = rl.RewardLooks.look, [calls]

    def look(self, session, step):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, session, step)

    return look


def test_what_can_not_be_read_is_refused(judged):
    with pytest.raises(ValueError, match=r"stop.judge is 'gold', which is no part of the reward; there are: score"):
        recipe("rloo", merge(judged, {"stop.judge": "gold"}))
    with pytest.raises(ValueError, match="reference is none"):
        recipe("rloo", merge(judged, {"stop.max_kl": 1.0, "reference": "none"}))
    with pytest.raises(ValueError, match="keep_best"):
        recipe("rloo", merge(judged, {"run.keep_best": 0}))


def test_nothing_is_better_than_minus_infinity():
    made, _ = looks(StopConfig(judge="j", max_kl=1), (-math.inf, 0), (0.0, 2))
    assert made.best == 0
