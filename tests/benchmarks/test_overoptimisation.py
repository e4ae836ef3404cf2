"""The table on over-optimisation from runs that are there: gold at equal KL, at the end, and by round."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "results"
sys.path.insert(0, str(FOLDER))

import overoptimisation_page as page  # noqa: E402  # type: ignore
from recording import READING  # noqa: E402  # type: ignore


def lines(path: Path, found) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def run(folder: Path, curve, judged=()) -> None:
    """A finished run of (kl, gold of two prompts) at each look."""
    metrics, texts = [], []
    for step, (kl, gold) in enumerate(curve):
        row = {"step": step, "held_out/kl": kl, "held_out/reward/proxy": 1.0, "held_out/distinct2": 0.5}
        metrics.append(row | ({"held_out/judge": judged[step]} if step < len(judged) else {}))
        texts += [{"step": step, "index": i, "reward": {"gold": x}} for i, x in enumerate(gold)]
    lines(folder / "metrics.jsonl", metrics)
    lines(folder / "samples.jsonl", reversed(texts))
    (folder / "summary.json").write_text(json.dumps({"finished": True}))


def test_gold_is_read_where_kl_first_reaches_a_level():
    looks = [
        page.Look(kl, np.array([g, 2 * g]), 0, 0) for kl, g in ((0, 0.0), (2, 1.0), (6, 3.0), (5, 9.0), (9, 9.0))
    ]
    found = page.at_kl(looks, 4.0)
    assert found is not None
    assert found.tolist() == [2.0, 4.0]
    assert page.at_kl(looks, 10.0) is None


def test_arms_are_compared_prompt_by_prompt_at_equal_kl_and_by_the_model_they_end_with(tmp_path):
    run(tmp_path / "happy/plain/seed-0", [(0, [0.5, 0.5]), (8, [0.9, 0.7]), (20, [0.1, 0.1])])
    run(tmp_path / "happy/early-stop/seed-0", [(0, [0.5, 0.5]), (8, [1.0, 0.8]), (20, [0.1, 0.1])], (0.0, 1.0, 0.2))
    table = page.measure(tmp_path, [0, 1])["happy"]
    assert table["plain"]["at 8"]["mean"] == pytest.approx(0.8)
    assert table["early stop"]["at 8 less plain"]["mean"] == pytest.approx(0.1)
    assert table["early stop"]["at 8 less plain"]["half"] == pytest.approx(0)
    assert table["plain"]["end"]["mean"] == pytest.approx(0.1)
    assert table["early stop"]["end"]["mean"] == pytest.approx(0.9)
    assert table["early stop"]["kl"] == 8
    assert "arena" not in page.measure(tmp_path, [0])


def test_the_arenas_rounds_are_above_the_start_or_not(tmp_path):
    for arm, golds in (("plain", (0.5, 0.6, 0.4)), ("early-stop", (0.5, 0.7, 0.6))):
        folder = tmp_path / f"arena/{arm}/seed-0"
        rows = [{"step": r, "kl": float(5 * r), "reward/judge": 1.0, "text/distinct2": 0.3} for r in range(3)]
        lines(folder / "metrics.jsonl", rows)
        for r, gold in enumerate(golds):
            lines(folder / f"round-{r:02d}/held-out.jsonl", [{"index": i, "gold": {"gold": gold}} for i in (1, 0)])
        kept = 5.0 if arm == "early-stop" else 10.0
        (folder / "summary.json").write_text(json.dumps({"finished": True, "kl_after": kept}))
    table = page.measure(tmp_path, [0])["arena"]
    assert [table[arm]["above_start"] for arm in ("plain", "early stop")] == [False, True]
    assert table["early stop"]["rounds"] == [[0.5, 0.7, 0.6]]
    assert table["early stop"]["end"]["mean"] == pytest.approx(0.7)


def test_a_new_table_leaves_the_pages_words(tmp_path):
    run(tmp_path / "happy/plain/seed-0", [(0, [0.5, 0.5]), (9, [0.9, 0.7])])
    (tmp_path / "overoptimisation.md").write_text(f"# T\n<!-- tables -->\nstale\n{READING}\n\nmine\n")
    page.write_page(tmp_path, tmp_path, [0])
    text = (tmp_path / "overoptimisation.md").read_text()
    assert text.startswith("# T\n<!-- tables -->")
    assert text.endswith("mine\n")
    assert "stale" not in text
    assert "| plain | 1 | 0.633" in text
