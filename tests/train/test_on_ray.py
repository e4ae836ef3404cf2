"""`run.launcher: ray` on a local cluster: the ranks and their server are placed there, and started again where they
die. Skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import steersman
from train_kit import merge, plain, recipe, rows, save_tiny, settings, weights

from steersman.types import SteersmanError
from steersman.verb_table import VERBS

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
MARK = "STEERSMAN_TEST_ON_RAY"
"""In the environment of whatever comes of these tests."""
SLOW = """
import time

def count_a(prompts, completions):
    time.sleep(0.2)
    return [c.count("a") / 4 for c in completions]
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Any:
    """Four cores, as far as Ray is told."""
    port, folder = 9300 + os.getpid() % 600, tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        patch.setenv(MARK, folder.name)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # this machine alone reaches the cluster
        patch.setenv("RAY_worker_niceness", "0")  # else a busy machine hardly runs them
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        words = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=4", "--include-dashboard=false",
            f"--object-store-memory={80 << 20}", "--disable-usage-stats",
            f"--temp-dir=/tmp/steersman-ray-{os.getpid()}",
        ]  # fmt: skip
        with (folder / "log").open("wb") as log:
            head = subprocess.Popen(words, stdout=log, stderr=log)
        until = time.monotonic() + 120
        while b"--address=" not in (folder / "log").read_bytes():
            assert head.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.1)
        yield
        import ray

        ray.shutdown()
        head.terminate()
        head.wait(timeout=60)


def processes(*words: str) -> list[int]:
    """Those of these tests whose command line has all of the words."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            ours = path.name.isdigit() and f"{MARK}={os.environ[MARK]}" in (path / "environ").read_text()
            line = (path / "cmdline").read_text().replace("\0", " ") if ours else ""
        except OSError:
            continue
        if line and all(word in line for word in words) and "keeper.py" not in line:
            found.append(int(path.name))
    return found


@pytest.mark.slow
@needs_ray
def test_a_rank_that_is_killed_is_started_again(cluster, tmp_path, capfd):
    """One rank with the engine inside: Ray places a single one too, and it goes on from its last checkpoint."""
    (tmp_path / "slow.py").write_text(SLOW)
    asked = merge(
        settings(tmp_path, save_tiny(tmp_path / "model")),
        {"iterations": 6, "run.save_every": 1, "run.threads": 1, "run.launcher": "ray"},
    )
    asked["reward"]["parts"]["score"]["function"] = f"{tmp_path / 'slow.py'}:count_a"
    run, killed = tmp_path / "run", []

    def kill() -> None:
        while not (run / "metrics.jsonl").exists() or len(rows(run)) <= 2:
            time.sleep(0.02)
        killed.extend(processes("steersman", "grpo", "steersman-ray-"))
        os.kill(killed[-1], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    summary = VERBS["grpo"].start("grpo", recipe("grpo", asked))
    assert len(killed) == 1
    assert summary["steps"] == 6
    assert "was ended by SIGKILL" in capfd.readouterr().err
    assert [row["step"] for row in rows(run)] == list(range(7))


@pytest.mark.slow
@needs_ray
def test_ranks_and_server_that_die_are_started_again(cluster, tmp_path, capfd):
    """Two ranks and a server that samples ahead: the server is killed, then a rank, and what is learned is what one
    process learns alone."""
    base = merge(
        settings(tmp_path, save_tiny(tmp_path / "model")),
        {
            "model.dtype": "float64", "iterations": 5, "run.save_every": 1, "run.threads": 1,
            "rollout.engine": "process", "rollout.ahead": 1, "rollout.timeout": 200,
        },
    )  # fmt: skip
    (tmp_path / "slow.py").write_text(SLOW)
    base["reward"]["parts"]["score"]["function"] = f"{tmp_path / 'slow.py'}:count_a"
    VERBS["grpo"].start("grpo", recipe("grpo", merge(base, {"run.dir": str(tmp_path / "alone")})))
    placed = merge(base, {"run.dir": str(tmp_path / "placed"), "run.devices": 2, "run.launcher": "ray"})
    killed = []

    def kill() -> None:
        for words, step in ((("remote.serve", "--threads"), 1), (("steersman", "grpo", "steersman-ray-"), 3)):
            while not (tmp_path / "placed" / "metrics.jsonl").exists() or len(rows(tmp_path / "placed")) <= step:
                time.sleep(0.02)
            victims = processes(*words)
            os.kill(victims[-1], signal.SIGKILL)
            killed.append(len(victims))

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    summary = VERBS["grpo"].start("grpo", recipe("grpo", placed))
    thread.join(timeout=5)
    assert killed == [1, 2]
    assert summary["steps"] == 5
    assert "Started again, 1 of at most 3 times" in capfd.readouterr().err
    a, b = weights(tmp_path / "alone" / "model"), weights(tmp_path / "placed" / "model")
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=1e-9) for k in a)
    assert [plain(r)["step"] for r in rows(tmp_path / "placed")] == list(range(6))
    assert not processes("remote.serve", "--threads")


@pytest.mark.slow
@needs_ray
def test_ctrl_c_ends_the_step_and_saves_where_a_rank_has_a_server(cluster, tmp_path):
    """The rank connects to Ray to place its server, and Ray's own handler ended it in the middle of a step."""
    (tmp_path / "slow.py").write_text(SLOW)
    asked = merge(
        settings(tmp_path, save_tiny(tmp_path / "model")),
        {
            "iterations": 400, "run.save_every": 400, "run.threads": 1, "run.launcher": "ray",
            "rollout.engine": "process", "rollout.timeout": 200,
        },
    )  # fmt: skip
    asked["reward"]["parts"]["score"]["function"] = f"{tmp_path / 'slow.py'}:count_a"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))
    process, run = steersman("grpo", str(tmp_path / "recipe.yaml")), tmp_path / "run"
    while not (run / "metrics.jsonl").exists() or len(rows(run)) <= 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 130, error
    saved = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    assert max(saved) == rows(run)[-1]["step"]
    assert saved != [2]  # which is kept as the best one
    assert not processes("remote.serve", "--threads")


@pytest.mark.slow
@needs_ray
def test_more_ranks_than_the_cluster_has_room_for_are_refused(cluster, tmp_path, monkeypatch):
    from steersman.distributed import on_ray

    monkeypatch.setattr(on_ray, "PLACED_IN", 1.0)
    base = settings(tmp_path, save_tiny(tmp_path / "model"))
    asked = recipe("grpo", merge(base, {"run.devices": 40, "run.launcher": "ray", "rollout.prompts": 40}))
    with pytest.raises(SteersmanError, match=r"40 ranks need .* lower run\.devices"):
        VERBS["grpo"].start("grpo", asked)
    assert not (tmp_path / "run").exists()


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    from steersman import extras

    monkeypatch.setattr(extras, "installed", lambda module: module != "ray")
    base = settings(tmp_path, save_tiny(tmp_path / "model"))
    asked = recipe("grpo", merge(base, {"run.launcher": "ray"}))
    with pytest.raises(SteersmanError, match=r"run\.launcher ray needs ray.*steersman\[ray\]"):
        VERBS["grpo"].start("grpo", asked)
