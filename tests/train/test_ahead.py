"""The sampler ahead of the learner: the same run as without, the staleness limit, and nothing lost by a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from forked import ENGINES, steersman
from train_kit import cut_after, merge, plain, recipe, rows, settings, weights

from steersman.data import Batches
from steersman.rollout.remote import launch
from steersman.rollout.remote.wire import ENGINE_KEY
from steersman.train import session
from steersman.train.ahead import Ahead
from steersman.train.roles import build_roles
from steersman.types import SteersmanError
from steersman.verbs import rl
from steersman.verbs.generate import GenerateRecipe

ELSEWHERE = {
    "rollout.engine": "process",
    "iterations": 4,
    "run.save_every": 2,
    "run.eval_every": 2,
    "rollout.timeout": 400,
}


@pytest.fixture(scope="module")
def elsewhere(mini, tmp_path_factory):
    """Settings of runs that sample from one server, started once: a start imports for seconds."""
    words = [sys.executable, "-m", "steersman.rollout.remote.serve", "--model", str(mini), "--threads", "1",
             "--max-batch", "64", "--dtype", "float32", "--device", "cpu", "--port"]  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENGINE_KEY, "a-key")
        launched = launch.ServerProcess(
            "engine process", lambda port: [*words, str(port)], log, timeout=400, key="a-key"
        )
        launched.start()
        yield {**ELSEWHERE, "rollout.url": [launched.wait().url]}
        launched.stop()


def unlike_syncs(row):
    return {k: v for k, v in plain(row).items() if not k.startswith("sync/")}


def ledger(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]


def test_another_process_learns_the_same_bits(base, tmp_path):
    """rollout.ahead 0: where the model samples changes nothing, and every sync has its receipt."""
    asked = merge(base, {**ELSEWHERE, "rollout.engine": "inside"})
    rl.run(recipe("grpo", asked))
    rl.run(recipe("grpo", merge(asked, {"rollout.engine": "process", "run.dir": str(tmp_path / "there")})))
    here, there = rows(tmp_path / "run"), rows(tmp_path / "there")
    assert [unlike_syncs(r) for r in here] == [unlike_syncs(r) for r in there]
    a, b = weights(tmp_path / "run" / "model"), weights(tmp_path / "there" / "model")
    assert all(torch.equal(a[k], b[k]) for k in a)
    gaps = [row["sync/gap"] for row in there if "sync/gap" in row]
    assert len(gaps) == 4
    assert max(gaps) < 1e-4


@pytest.mark.slow
def test_ahead_0_is_the_loop_of_today(base, elsewhere, tmp_path, monkeypatch):
    """The asynchronous loop itself, with nothing ahead, bit for bit."""
    rl.run(recipe("grpo", merge(base, {**ELSEWHERE, "rollout.engine": "inside"})))
    monkeypatch.setattr(rl, "OnPolicy", Ahead)
    rl.run(recipe("grpo", merge(base, {**elsewhere, "run.dir": str(tmp_path / "there")})))
    a, b = weights(tmp_path / "run" / "model"), weights(tmp_path / "there" / "model")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ahead"), [("grpo", 1), ("ppo", 2), ("dapo", 1)])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(name, ahead, base, elsewhere, tmp_path, monkeypatch):
    asked = merge(base, {**elsewhere, "iterations": 5, "rollout.ahead": ahead})
    rl.run(recipe(name, asked))
    again = merge(asked, {"run.dir": str(tmp_path / "cut")})
    with monkeypatch.context() as patch:
        from steersman.reward import core

        patch.setattr(core, "load_function", lambda _: cut_after(6))
        with pytest.raises(KeyboardInterrupt):
            rl.run(recipe(name, again))
    rl.run(recipe(name, again), resume=True)
    a, b = weights(tmp_path / "run" / "model"), weights(tmp_path / "cut" / "model")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [unlike_syncs(r) for r in rows(tmp_path / "run")] == [unlike_syncs(r) for r in rows(tmp_path / "cut")]
    for run in (tmp_path / "run", tmp_path / "cut"):
        used = [row for row in ledger(run) if row["stands"] == "used"]
        assert [row["batch"] for row in used] == [0, 1, 2, 3, 4]
        for row in used:  # batch b by version max(0, b - k), exactly
            assert row["versions"] == [max(0, row["batch"] - ahead)] * 2
    assert_each_prompt_as_often_as_its_order_says(tmp_path / "cut", tmp_path / "run")


def assert_each_prompt_as_often_as_its_order_says(run: Path, whole: Path) -> None:
    counts = [
        Counter(p for row in ledger(r) if row["stands"] == "used" for p in row["prompts"]) for r in (run, whole)
    ]
    assert counts[0] == counts[1]


SLOW = """
import time

def count_a(prompts, completions):
    time.sleep(0.15)
    return [c.count("a") / 4 for c in completions]
"""


@pytest.fixture(scope="module")
def undisturbed(mini, elsewhere, tmp_path_factory):
    """(folder of a run that nothing befell, its settings)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "slow.py").write_text(SLOW)
    asked = merge(settings(folder, mini), {"iterations": 8, "rollout.ahead": 2, "rollout.held_out": 0})
    asked["reward"]["parts"]["score"]["function"] = f"{folder / 'slow.py'}:count_a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "write_report", lambda folder: folder / "report.html")
        rl.run(recipe("grpo", merge(asked, elsewhere | {"iterations": 8})))
    return folder / "run", merge(asked, {**ELSEWHERE, "iterations": 8})


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["learner", "server", "both"])
def test_sigkill_loses_nothing(victim, undisturbed, tmp_path):
    """A run of its own process, killed once in the middle: the same weights as an undisturbed one."""
    whole, asked = undisturbed
    file, run = tmp_path / "recipe.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(merge(asked, {"run.dir": str(run)})))
    learner = steersman("grpo", str(file))
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 4:
        assert learner.poll() is None, learner.communicate()
        time.sleep(0.02)
    if victim != "learner":
        for pid in servers_of(learner.pid):
            os.kill(pid, signal.SIGKILL)
    if victim != "server":
        learner.kill()
        learner.wait()
        learner = steersman("grpo", str(file), "--resume")
    assert learner.wait() == 0, learner.communicate()
    a, b = weights(whole / "model"), weights(run / "model")
    assert all(torch.equal(a[k], b[k]) for k in a)
    used = [row for row in ledger(run) if row["stands"] == "used"]
    assert [row["batch"] for row in used] == list(range(8))
    assert all(row["batch"] - row["versions"][0] <= 2 for row in used)
    assert_each_prompt_as_often_as_its_order_says(run, whole)


def servers_of(learner: int) -> list[int]:
    """The engines that the learner's keepers watch."""

    def children(pid: int) -> list[int]:
        found = []
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(x) for x in (task / "children").read_text().split()]
        return found

    return [engine for keeper in children(learner) for engine in children(keeper)]


@pytest.mark.slow
def test_adapters_alone_train_the_same(base, elsewhere, tmp_path, monkeypatch):
    """rollout.sync adapter: whole weights or the adapter alone, what is learned is the same to rounding."""
    asked = merge(base, {**ELSEWHERE, "model.lora": {"r": 2}, "rollout.ahead": 1, "optimizer.lr": 0.02})
    rl.run(recipe("grpo", merge(asked, elsewhere)))
    monkeypatch.setattr(launch, "subprocess", ENGINES)
    rl.run(recipe("grpo", merge(asked, {"rollout.sync": "adapter", "run.dir": str(tmp_path / "there")})))
    a, b = weights(tmp_path / "run" / "model"), weights(tmp_path / "there" / "model")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    sent = [row["sync/bytes"] for row in rows(tmp_path / "there") if "sync/bytes" in row]
    whole = [row["sync/bytes"] for row in rows(tmp_path / "run") if "sync/bytes" in row]
    assert max(sent) < min(whole)


@pytest.mark.slow
def test_cut_answers_stay_within_the_limit(base, elsewhere, tmp_path):
    extra = {**elsewhere, "rollout.ahead": 1, "rollout.in_flight": "cut", "rollout.max_new_tokens": 40}
    rl.run(recipe("grpo", merge(base, extra)))
    used = [row for row in ledger(tmp_path / "run") if row["stands"] == "used"]
    assert [row["batch"] for row in used] == [0, 1, 2, 3]
    assert all(0 <= row["batch"] - row["versions"][0] <= 1 for row in used)
    assert max(row["ahead/lag_max"] for row in rows(tmp_path / "run") if "ahead/lag_max" in row) <= 1


@pytest.mark.slow
def test_a_lower_limit_is_kept_after_a_resume(base, elsewhere, tmp_path):
    """What was sampled ahead and is too old by the new limit is sampled again, prompt by prompt."""
    asked = merge(base, {**elsewhere, "rollout.ahead": 3, "iterations": 4})
    rl.run(recipe("grpo", asked))
    lower = merge(asked, {"rollout.ahead": 1, "iterations": 7})
    rl.run(recipe("grpo", lower), resume=True)
    used = [row for row in ledger(tmp_path / "run") if row["stands"] == "used"]
    assert [row["batch"] for row in used] == list(range(7))
    assert all(row["batch"] - row["versions"][0] <= 1 for row in used[4:])
    order = [
        i for _, batch in zip(range(7), Batches(12, 4, 0, drop_last=True).forever(), strict=False) for i in batch
    ]
    assert Counter(p for row in used for p in row["prompts"]) == Counter(order)


@pytest.mark.parametrize(
    ("name", "extra", "said"),
    [
        ("grpo", {"rollout.ahead": 1}, "ahead samples while the policy learns"),
        ("remax", {"rollout.ahead": 1, "rollout.engine": "process"}, "answers each prompt greedily"),
        ("nlpo", {"rollout.engine": "process"}, "mask of a second model"),
        ("grpo", {"rollout.servers": 2}, "engine is inside"),
        ("grpo", {"rollout.sync": "adapter"}, "engine is inside"),
        ("grpo", {"rollout.folder": "there"}, "engine is inside"),
        (
            "grpo",
            {"rollout.engine": "vllm", "rollout.sync": "nccl"},
            "a route between GPUs that steersman does not have",
        ),
        (
            "grpo",
            {"rollout.engine": "vllm", "rollout.sync": "ipc"},
            "a route between GPUs that steersman does not have",
        ),
        ("grpo", {"rollout.engine": "colocated"}, "vLLM inside the learner's process"),
        (
            "grpo",
            {"rollout.engine": "process", "run.devices": 2, "parallel.mode": "fsdp", "model.lora": {"r": 2}},
            "use parallel.mode: replicas",
        ),
        (
            "grpo",
            {
                "rollout.engine": "process",
                "rollout.ahead": 1,
                "run.devices": 2,
                "parallel.mode": "fsdp",
                "reward.parts": {"judge": {"model": "a folder"}},
            },
            "a reward model that lies in pieces needs all ranks",
        ),
        ("grpo", {"rollout.engine": "vllm", "rollout.top_p": 0.9}, "only beside a top_k"),
        (
            "grpo",
            {"rollout.engine": "process", "rollout.url": ["http://a"], "rollout.servers": 2},
            "give one of both",
        ),
    ],
)
def test_what_can_not_work_is_refused_before_anything_starts(name, extra, said, base):
    with pytest.raises(ValueError, match=said):
        recipe(name, merge(base, extra))


def test_generate_has_no_loss_that_would_need_a_top_k():
    asked = {"engine": "vllm", "top_p": 0.9, "min_p": 0.01}
    made = GenerateRecipe.model_validate({"model": {"path": "m"}, "prompts": ["a"], "rollout": asked})
    assert made.rollout.sampling().truncates


def test_a_vllm_that_is_not_there_is_named_before_the_run(base):
    with pytest.raises(SteersmanError, match="has no vLLM"):
        build_roles(recipe("grpo", merge(base, {"rollout.engine": "vllm"})), torch.device("cpu"))
    asked = merge(base, {"rollout.engine": "vllm", "rollout.python": "/no/python"})
    with pytest.raises(SteersmanError, match=r"rollout\.python: /no/python can not be run"):
        build_roles(recipe("grpo", asked), torch.device("cpu"))
