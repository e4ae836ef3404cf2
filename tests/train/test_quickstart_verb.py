"""`steersman quickstart` as a user calls it, only smaller: the included model, all four stages, and a resume."""

from __future__ import annotations

import json
import shutil

import pytest

from steersman.assets import openings
from steersman.cli import main
from steersman.reward.gold import judge
from steersman.verbs import quickstart
from steersman.verbs.quickstart import _whole_sentences

FEW = openings()[:72]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Words of the command for a run of seconds: seventy-two openings, four of them held out."""
    monkeypatch.setattr(quickstart, "openings", lambda: FEW)
    return [
        "quickstart", "--dir", str(tmp_path / "run"), "--threads", "1", "--sft_samples", "2", "--pair_samples", "2",
        "--iterations", "1", "--held_out", "4", "--max_new_tokens", "24",
    ]  # fmt: skip


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_stages_run_and_tell_what_they_changed(tiny, tmp_path, capsys):
    assert main(tiny) == 0
    root = tmp_path / "run"
    summary = json.loads((root / "summary.json").read_text())
    assert summary["ratio_gap"] < 1e-3
    assert 0 <= summary["reward_model_accuracy"] <= 1
    assert (root / "3-ppo" / "model" / "model.safetensors").exists()

    # demonstrations end with a sentence; pairs are the judge's, and no held-out opening is in either
    demonstrations, pairs = lines(root / "demonstrations.jsonl"), lines(root / "pairs.jsonl")
    assert all(row["completion"].rstrip()[-1] in '.!?"' for row in demonstrations)
    assert all(judge(row["chosen"]).gold > judge(row["rejected"]).gold for row in pairs)
    assert {row["prompt"] for row in [*demonstrations, *pairs]} <= set(FEW)
    held = [row["prompt"] for row in lines(root / "held-out-openings.jsonl")]
    assert held == FEW[:4]

    # the gold numbers are those of the held stories themselves
    samples = lines(root / "3-ppo" / "samples.jsonl")
    last = max(row["step"] for row in samples)
    for step, key in ((0, "gold_before"), (last, "gold_after")):
        gold = [judge(row["completion"]).gold for row in samples if row["step"] == step]
        assert summary[key] == pytest.approx(sum(gold) / len(gold))

    told = capsys.readouterr().out
    assert "gold score" in told
    assert "steersman quickstart" not in told, "nothing is left to go on with"

    # a second run in the same folder is refused; resumed, it skips what is finished and does the rest again
    assert main(tiny) == 2
    assert "--resume" in capsys.readouterr().err
    weights = (root / "3-ppo" / "model" / "model.safetensors").read_bytes()
    kept = (root / "2-reward" / "summary.json").stat().st_mtime_ns
    shutil.rmtree(root / "3-ppo")
    assert main([*tiny, "--resume"]) == 0
    assert (root / "2-reward" / "summary.json").stat().st_mtime_ns == kept
    assert (root / "3-ppo" / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One ran. Two sat. Three we", "One ran. Two sat."),
        ('He ran. "Look!" she said. She w', 'He ran. "Look!" she said.'),
        ('He ran. "Look! A fox. And t', 'He ran. "Look! A fox."'),
        ("Only one sentence. And", None),
        ("no end at all", None),
    ],
)
def test_demonstrations_end_where_a_sentence_does(text, whole):
    assert _whole_sentences(text) == whole
