"""The script behind docs/results/ab-tests.md, on fewer and shorter experiments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from ab_tests import no_difference  # noqa: E402  # type: ignore


def test_no_kind_of_data_errs_more_often_than_promised():
    rows = no_difference(200, 150)
    assert len(rows) == 6
    for row in rows:
        assert row["ours"] <= 0.05, row
    assert max(row["z_peeked"] for row in rows) > 0.2


def test_the_page_says_what_was_recorded():
    told = json.loads((ROOT / "docs/results/ab-tests.json").read_text())
    page = (ROOT / "docs/results/ab-tests.md").read_text()
    assert told["experiments"] == 10_000
    for row in told["errors"]:
        assert f"| {row['data']} | {row['ours']:.2%} | {row['z_peeked']:.1%} | {row['z_once']:.1%} |" in page
    for row in told["power"]:
        assert f"| {row['fixed']:,} | {row['median']:,} | {row['needed']:,} | {row['power_at_fixed']:.0%} |" in page
