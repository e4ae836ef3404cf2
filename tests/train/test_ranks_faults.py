"""Runs on several processes end as they should: errors once and by name, signals at a step's end, no orphans."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import Python, steersman
from letter_models import rows_of
from ranks_kit import trained_weights
from train_kit import merge, plain, save_tiny, settings

pytestmark = pytest.mark.slow
REWARDS = """
import os, signal, time
from pathlib import Path

def counted(prompts, completions):
    return [c.count("a") / 4 for c in completions]

def slow(prompts, completions):
    time.sleep(0.3)
    return counted(prompts, completions)

def broken(prompts, completions):
    raise ValueError("no such thing")
"""


@pytest.fixture
def base(tmp_path) -> dict[str, Any]:
    (tmp_path / "own.py").write_text(REWARDS)
    found = settings(tmp_path, save_tiny(tmp_path / "model"))
    return merge(found, {"run.devices": 2, "run.save_every": 1, "parallel.timeout": 60})


def begin(tmp_path: Path, values: dict[str, Any], *words: str, forks: bool = True) -> Python:
    """The command line in a process of its own, deaf to nothing; without `forks` its ranks are new Pythons."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return steersman("grpo", str(tmp_path / "recipe.yaml"), *words, env=env, forks=forks)


def children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_steps(run: Path, count: int, process: Python) -> None:
    until = time.monotonic() + 400
    while time.monotonic() < until and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > count:
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate(timeout=5))


def gone(pids: list[int], seconds: float = 90) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_an_error_of_the_users_is_told_once(base, tmp_path):
    process = begin(tmp_path, merge(base, {"reward.parts.score.function": f"{tmp_path}/own.py:broken"}), forks=False)
    out, error = process.communicate(timeout=400)
    assert process.returncode == 2
    assert error.count("no such thing") == 1, error
    assert "Traceback" not in error + out


def test_a_wrong_recipe_is_refused_before_any_rank_starts(base, tmp_path):
    for change, said in (
        ({"parallel.tensor": 2}, "tensor is 2"),
        ({"parallel.offload": True}, "offload goes with mode: fsdp"),
        ({"parallel.mode": "fsdp", "parallel.replicas": 3}, "does not divide"),
    ):
        process = begin(tmp_path, merge(base, change))
        _, error = process.communicate(timeout=400)
        assert process.returncode == 2
        assert said in error, error


def test_a_rank_that_is_killed_ends_all_and_is_named(base, tmp_path):
    values = merge(base, {"reward.parts.score.function": f"{tmp_path}/own.py:slow", "iterations": 200})
    process = begin(tmp_path, values)
    wait_for_steps(tmp_path / "run", 2, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, error = process.communicate(timeout=400)
    assert process.returncode == 2
    assert "SIGKILL" in error
    assert "--resume" in error
    assert gone(ranks)


def test_a_rank_that_hangs_is_named_within_the_time_limit(base, tmp_path):
    values = merge(base, {"reward.parts.score.function": f"{tmp_path}/own.py:slow", "iterations": 400,
                          "parallel.timeout": 8})  # fmt: skip
    process = begin(tmp_path, values)
    wait_for_steps(tmp_path / "run", 2, process)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    started = time.monotonic()
    _, error = process.communicate(timeout=150)
    assert time.monotonic() - started < 75
    assert process.returncode == 2
    assert "rank 1 was last in call" in error, error
    assert gone(ranks)


def test_a_signal_is_agreed_and_the_run_goes_on_with_another_number_of_ranks(base, tmp_path):
    values = merge(base, {"reward.parts.score.function": f"{tmp_path}/own.py:slow", "iterations": 6,
                          "model.dtype": "float64"})  # fmt: skip
    process = begin(tmp_path, values)
    wait_for_steps(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=400)
    assert process.returncode == 130, error
    assert error.count("finishing this step") == 1
    saved = max((tmp_path / "run" / "checkpoints").glob("step-*")).name
    assert saved != "step-00000006"
    process = begin(tmp_path, merge(values, {"run.devices": 1}), "--resume")
    assert process.wait(timeout=400) == 0, process.communicate()
    whole = begin(tmp_path, merge(values, {"run.devices": 1, "run.dir": str(tmp_path / "whole")}))
    assert whole.wait(timeout=400) == 0
    for name, value in trained_weights(tmp_path / "whole").items():
        torch.testing.assert_close(trained_weights(tmp_path / "run")[name], value, rtol=0, atol=1e-9)
    assert [r["step"] for r in rows_of(tmp_path / "run" / "metrics.jsonl")] == [*range(7)]


def test_ctrl_c_outside_a_step_is_told_once_as_of_one_process(base, tmp_path):
    asked = {
        "model": base["model"], "data": base["data"], "out": str(tmp_path / "answers.jsonl"), "run": {"devices": 2},
        "rollout": {"samples": 4000, "max_new_tokens": 40, "min_new_tokens": 39},
    }  # fmt: skip
    (tmp_path / "generate.yaml").write_text(yaml.safe_dump(asked))
    process = steersman(
        "generate", str(tmp_path / "generate.yaml"), env={**os.environ, "OMP_NUM_THREADS": "1"}, forks=True
    )
    until = time.monotonic() + 200
    while not (tmp_path / "answers.jsonl.parts").exists() and time.monotonic() < until:
        time.sleep(0.1)
    ranks = children(process.pid)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=100)
    assert process.returncode == 130, error
    assert (out + error).count("interrupted") == 1, out + error
    assert "Traceback" not in out + error
    assert "rank" not in error
    assert gone(ranks)


def test_ranks_end_when_their_starter_is_killed(base, tmp_path):
    values = merge(base, {"reward.parts.score.function": f"{tmp_path}/own.py:slow", "iterations": 400})
    process = begin(tmp_path, values)
    wait_for_steps(tmp_path / "run", 2, process)
    ranks = children(process.pid)
    process.kill()
    process.communicate(timeout=30)
    assert gone(ranks)


def test_killed_at_any_moment_nothing_is_lost(base, tmp_path):
    values = merge(base, {"reward.parts.score.function": f"{tmp_path}/own.py:counted", "iterations": 12})
    layouts = [{"run.devices": 2}, {"run.devices": 2, "parallel.mode": "fsdp"}, {"run.devices": 1}]
    for turn, layout in enumerate(layouts):
        process = begin(tmp_path, merge(values, layout), *(["--resume"] if turn else []))
        wait_for_steps(tmp_path / "run", 3 * (turn + 1), process)
        for pid in (*children(process.pid), process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
    process = begin(tmp_path, merge(values, {"run.devices": 2}), "--resume")
    _, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    found = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in found] == [*range(13)]
    alone = begin(tmp_path, merge(values, {"run.devices": 1, "run.dir": str(tmp_path / "alone")}))
    assert alone.wait(timeout=400) == 0
    expected = rows_of(tmp_path / "alone" / "metrics.jsonl")
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        assert plain(got)["reward/total"] == pytest.approx(plain(wanted)["reward/total"], abs=1e-5)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


FAILS_LATER = """
import os
from dataclasses import dataclass
from typing import ClassVar
from steersman.algorithms.grpo import GRPO

CALLS = []

def gone(prompts, completions):
    CALLS.append(1)
    if len(CALLS) == 5 and os.environ.get("GONE"):
        raise ConnectionError("judge gone")
    return [c.count("a") / 4 for c in completions]

class OneRank(GRPO):
    def advantage(self, traj):
        CALLS.append(1)
        if os.environ["RANK"] == "1" and len(CALLS) == 3:
            raise ValueError("on this rank alone")
        return super().advantage(traj)
"""


def test_an_error_of_all_ranks_saves_the_last_step(base, tmp_path, monkeypatch):
    (tmp_path / "later.py").write_text(FAILS_LATER)
    values = merge(base, {"reward.parts.score.function": f"{tmp_path}/later.py:gone", "iterations": 4,
                          "run.save_every": 50, "run.eval_every": 50})  # fmt: skip
    monkeypatch.setenv("GONE", "1")
    process = begin(tmp_path, values, forks=False)
    _, error = process.communicate(timeout=400)
    assert process.returncode == 2, error
    assert error.count("judge gone") == error.count("Step 3 is saved: mend what failed and go on with --resume") == 1
    monkeypatch.delenv("GONE")
    for words, folder in ((["--resume"], "run"), ([], "whole")):
        process = begin(tmp_path, merge(values, {"run.dir": str(tmp_path / folder)}), *words)
        assert process.wait(timeout=400) == 0, process.communicate()
    cut, whole = (trained_weights(tmp_path / folder) for folder in ("run", "whole"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert [plain(r) for r in rows_of(tmp_path / "run/metrics.jsonl")] == [
        plain(r) for r in rows_of(tmp_path / "whole/metrics.jsonl")
    ]


def test_an_error_of_one_rank_saves_nothing_and_holds_nobody_up(base, tmp_path):
    (tmp_path / "later.py").write_text(FAILS_LATER)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            merge(base, {"run.save_every": 50, "run.eval_every": 50, "iterations": 4, "parallel.timeout": 3600})
        )
    )
    process = steersman(
        f"{tmp_path}/later.py:OneRank", str(tmp_path / "recipe.yaml"), env={**os.environ}, forks=False
    )
    out, error = process.communicate(timeout=400)
    assert "on this rank alone" in error + out
    assert "Step 2 is not saved, since not every rank ended there by an error: nothing is saved" in error + out
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
