"""The benchmarks' arithmetic by hand, their turns with a real worker, and their GPU path where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))

from common import write_inputs  # noqa: E402  # type: ignore
from floor import Phase, Rates, Work, on_policy  # noqa: E402  # type: ignore


def test_floor_by_hand():
    work = Work(hidden=2, layers=1, inner=3, vocab=5)
    assert (work.trunk, work.head) == (4 * 4 + 3 * 6, 10)
    # two operations per weight and token, but for the last feed-forward layer of the two states that nobody reads;
    # attention over 3 tokens: 4 * 2 * 9 / 2; then 2 * 10 for one headed token
    assert work.forward([(3, 0)], 1) == 2 * 34 * 3 - 2 * 2 * 18 + 36 + 20
    assert work.forward([(3, 0)], read=3) == 2 * 34 * 3 + 36
    assert work.run("x", [(3, 0)], 1, trained=True) == Phase("x", 3 * (204 - 72 + 36 + 20), 3 * 44 * 4)
    step = work.decode("d", 2, 4, 2)
    assert step == [Phase("d", 2 * (2 * 34 + 4 * 2 * 5.5 + 20), (34 + 10 + 2 * 2 * 5 * 2) * 4)]
    assert Rates(10.0, 2.0).seconds([Phase("a", 100, 4), Phase("a", 1, 6), Phase("b", 5, 0)]) == {"a": 13.0, "b": 0.5}


def test_shared_prompts_count_once():
    work = Work(hidden=64, layers=2, inner=100, vocab=300)
    alone, groups = (sum(p.flops for p in on_policy(work, "grpo", n, 64 // n)) for n in (64, 8))
    assert 0.6 < groups / alone < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["grpo", "dpo"])
def test_a_worker_takes_turns(tmp_path, scenario, monkeypatch):
    monkeypatch.setitem(sys.modules["common"].SHAPES, "tiny", {"hidden": 32, "layers": 1, "inner": 48, "vocab": 128})
    write_inputs(tmp_path, "tiny")
    rows, samples = ("2", "2") if scenario == "grpo" else ("1", "1")
    out = subprocess.run(
        [sys.executable, str(FOLDER / "ours.py"), scenario, str(tmp_path), "1", "cpu", "float32", rows, samples],
        input="go\ngo\nend\n", capture_output=True, text=True, check=True, timeout=200,
    ).stdout  # fmt: skip
    ready, first, second, end = (json.loads(line) for line in out.splitlines())
    assert first["seconds"] > 0
    assert second["tokens"] == first["tokens"] > 0
    assert end["peak_mib"] > end["imported_mib"] > 0
    assert ("once" in ready) == (scenario == "dpo")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_path(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules["common"].SHAPES, "tiny", {"hidden": 64, "layers": 2, "inner": 96, "vocab": 512})
    write_inputs(tmp_path, "tiny")
    out = subprocess.run(
        [sys.executable, str(FOLDER / "ours.py"), "grpo", str(tmp_path), "1", "cuda", "bfloat16", "2", "4"],
        input="go\ngo\nend\n", capture_output=True, text=True, check=True, timeout=300,
    ).stdout  # fmt: skip
    assert json.loads(out.splitlines()[-1])["device_peak_mib"] > 0
