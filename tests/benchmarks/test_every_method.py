"""The study of all on-policy methods: its search of rates, Holm's correction, and its table from finished runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "results"
sys.path.insert(0, str(FOLDER))

import every_method  # noqa: E402  # type: ignore

from steersman.algorithms import ALGORITHMS  # noqa: E402
from steersman.statistics.estimates import holm  # noqa: E402


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_search_goes_on_until_the_best_rate_lies_inside():
    found: dict[float, float] = {}
    while (rate := every_method.next_rate("ppo", found)) is not None:
        found[rate] = -abs(rate - 0.02)
    assert min(found) < max(found, key=lambda r: found[r]) < max(found)
    assert len(found) == len(every_method.GRID) + 3
    whole = {rate: rate for rate in (*every_method.GRID, 0.09)}
    assert every_method.next_rate("ppo", whole) is None, "an end there is"
    assert every_method.next_rate("trpo", {}) == every_method.GRID[0]
    assert every_method.next_rate("trpo", {every_method.GRID[0]: 0.7}) is None, "its actor has no rate"


def finished_run(folder: Path, gain: float) -> None:
    folder.mkdir(parents=True)
    summary = {"finished": True, "reward/total_before": 0.0, "reward/total_after": gain, "kl_after": 0.0}
    summary["distinct2_after"] = 0.5
    (folder / "summary.json").write_text(json.dumps(summary))
    looks = [{"step": s, "score/std": 1.0, "held_out/reward/total": gain * s / 4} for s in (0, 4)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, looks)) + "\n")


def test_the_table_ranks_the_methods_and_says_which_lags_are_sure(tmp_path):
    gains = {"rloo": [1.0, 1.1, 1.2], "gpg": [1.01, 1.09, 1.19], "sapo": [0.2, 0.3, 0.41]}
    for method, values in gains.items():
        finished_run(tmp_path / "search" / f"{method}@0.001", 1.0)
        for seed, gain in enumerate(values):
            finished_run(tmp_path / f"seed-{seed}" / method, gain)
    made = every_method.table(list(gains), tmp_path, [0, 1, 2])
    assert list(made) == ["rloo", "gpg", "sapo"]
    assert made["rloo"]["p_holm"] is None
    assert made["gpg"]["p_holm"] > 0.3
    assert made["sapo"]["p_holm"] < 0.01
    assert made["sapo"]["rate"] == 0.001
    lines = every_method.markdown(made).splitlines()
    assert lines[2] == "| RLOO | 0.001 | 1.1 ± 0.1 | 0 ± 0 | 0.5 ± 0 | 1.10 ± 0.10 | best |"
    assert len(lines) == 5
    every_method.draw(list(gains), tmp_path, [0, 1, 2], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_every_method_has_settings():
    assert all(every_method.settings(name)["epochs"] == 1 for name in ALGORITHMS)
