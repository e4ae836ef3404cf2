"""The script behind docs/results/ab-tests.md, on fewer and shorter experiments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from ab_tests import SIZES, no_difference, power, size_row  # noqa: E402  # type: ignore


def test_no_kind_of_data_errs_more_often_than_promised():
    rows = no_difference(200, 150)
    assert len(rows) == 6
    for row in rows:
        assert row["ours"] <= 0.05, row
    assert max(row["z_peeked"] for row in rows) > 0.2


def test_the_power_of_few_runs_lies_within_its_margin():
    """The first wealth of 20 or more among all bets, multiplied out here, on other draws than the script's."""
    recorded = json.loads((ROOT / "docs/results/ab-tests.json").read_text())["power"][-1]
    rng, bets = np.random.default_rng(7), np.geomspace(0.01, 0.9, 24)
    u = rng.random((4000, recorded["fixed"]))
    won = np.where(u < 0.6, 1.0, np.where(u < 0.8, 0.0, -1.0))  # a win rate of 0.7 with a fifth of ties
    wealth = sum(np.cumprod(1 + k * won, 1) + np.cumprod(1 - k * won, 1) for k in bets) / (2 * len(bets))
    own = float((wealth >= 20).any(1).mean())
    low, high = (recorded["power_at_fixed"][key] for key in ("low", "high"))
    assert low - 0.02 < own < high + 0.02
    (few,) = power(1000, SIZES[-1:])
    assert few["fixed"] == recorded["fixed"]
    assert few["power_at_fixed"]["low"] < own < few["power_at_fixed"]["high"]
    assert few["needed"][1] <= recorded["needed"][0] <= few["needed"][2]


def test_the_page_says_what_was_recorded():
    told = json.loads((ROOT / "docs/results/ab-tests.json").read_text())
    page = (ROOT / "docs/results/ab-tests.md").read_text()
    assert told["experiments"] == 10_000
    for row in told["errors"]:
        assert f"| {row['data']} | {row['ours']:.2%} | {row['z_peeked']:.1%} | {row['z_once']:.1%} |" in page
    for row in told["power"]:
        assert size_row(row) in page
        assert row["power_at_fixed"]["n"] == told["runs"] == 20_000
