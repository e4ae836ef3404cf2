"""A reward is called by one thread at a time, and what was sampled ahead stays written down after an early end."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from train_kit import merge, recipe

from steersman.train.roles import build_roles
from steersman.types import Prompt, Sample
from steersman.verbs import rl

SLOW = """
import time

INSIDE, MOST = [], []

def slow(prompts, completions):
    INSIDE.append(1)
    MOST.append(len(INSIDE))
    time.sleep(0.4)
    INSIDE.pop()
    assert MOST[-1] == 1, "called twice at a time"
    return [c.count("a") / 4 for c in completions]
"""
ELSEWHERE = {"rollout.engine": "process", "rollout.timeout": 400, "run.eval_every": 1}


def test_threads_wait_for_the_reward(base):
    roles, inside, most = build_roles(recipe("grpo", base), torch.device("cpu")), [], []

    def score(samples):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()

    roles.reward = SimpleNamespace(score=score)  # pyright: ignore[reportAttributeAccessIssue]
    samples = [Sample(Prompt([0], "p"), [0], [0.0], "eos", "a")]
    threads = [threading.Thread(target=roles.score, args=[samples]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_look_at_held_out_prompts_waits_for_the_reward_of_what_is_sampled_ahead(base, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    own = {"reward.parts.score.function": f"{tmp_path / 'slow.py'}:slow", "rollout.ahead": 1, "iterations": 4}
    assert rl.run(recipe("grpo", merge(base, {**ELSEWHERE, **own})))["finished"]


@pytest.mark.slow
def test_an_early_end_leaves_what_was_used_in_the_ledger(base, tmp_path):
    (tmp_path / "judges.py").write_text(
        "CALLS = []\n\ndef falls(prompts, completions):\n    CALLS.append(1)\n"
        "    return [-float(len(CALLS))] * len(completions)\n"
    )
    own = {
        "reward.parts.other": {"function": f"{tmp_path / 'judges.py'}:falls", "weight": 0.0}, "rollout.ahead": 1,
        "iterations": 8, "stop": {"judge": "other", "patience": 3},
    }  # fmt: skip
    out = rl.run(recipe("rloo", merge(base, {**ELSEWHERE, **own})))
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert out["steps"] == 3
    assert [row["batch"] for row in rows if row["stands"] == "used"] == [0, 1, 2]
