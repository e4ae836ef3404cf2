"""Sets that are mixed, in the loops: what is trained on, and that a run goes on from any checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from letter_models import WORDS, rows_of, write_jsonl
from train_kit import merge, prompts_file, recipe, weights

from steersman.verbs import preference, rl, sft


def settings(tmp_path: Path, mini: Path, **more) -> dict:
    one = write_jsonl(
        tmp_path / "one.jsonl", [{"prompt": "ask" + "?" * i, "completion": w} for i, w in enumerate(WORDS)]
    )
    two = write_jsonl(tmp_path / "two.jsonl", [{"text": w + " " + w} for w in WORDS])
    return merge(
        {
            "model": {"path": str(mini)}, "data": {"path": [str(one), str(two)]}, "optimizer": {"lr": 0.01},
            "train": {"batch_size": 4, "epochs": 2}, "run": {"threads": 1, "save_every": 2, "keep_last": 99},
        },
        more,
    )  # fmt: skip


def goes_on(asked: dict, tmp_path: Path, from_step: int) -> None:
    """Takes away all that a run did after a step, resumes it, and compares weights and log."""
    run = tmp_path / "run"
    asked = merge(asked, {"run.dir": str(run)})
    sft.run(sft.SFTRecipe.model_validate(asked))
    before, log = weights(run / "model"), rows_of(run / "metrics.jsonl")
    shutil.rmtree(run / "model")
    late = [p for p in (run / "checkpoints").glob("step-*") if int(p.name[5:]) > from_step]
    assert late
    for path in late:
        shutil.rmtree(path)
    sft.run(sft.SFTRecipe.model_validate(asked), resume=True)
    after = weights(run / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (log, rows_of(run / "metrics.jsonl"))]
    assert losses[0] == losses[1]


def test_a_mixture_goes_on_from_a_checkpoint_in_its_middle(tmp_path, mini):
    goes_on(settings(tmp_path, mini, **{"data.mix": [3, 1]}), tmp_path, from_step=6)


def test_prompts_of_several_sets_are_sampled_in_their_shares(base, tmp_path, monkeypatch):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "x" * (i + 1)} for i in range(4)])
    asked = recipe("rloo", merge(base, {"data.path": [str(prompts_file(tmp_path)), str(other)], "data.mix": [1, 3]}))
    seen: list[str] = []
    real = rl.OnPolicy.next_prompts
    monkeypatch.setattr(
        rl.OnPolicy, "next_prompts", lambda *a: (got := real(*a), seen.extend(p.text for p in got))[0]
    )
    rl.run(asked)
    share = sum(text.startswith("x") for text in seen) / len(seen)
    assert share == pytest.approx(0.75, abs=0.15)


def many(tmp_path: Path, count: int = 50) -> Path:
    rows = [{"prompt": f"ask{'?' * (i % 9)}", "completion": WORDS[i % 12] + " a" * (i // 12)} for i in range(count)]
    return write_jsonl(tmp_path / "many.jsonl", rows)


def test_rows_on_disk_train_bit_for_bit_as_rows_in_memory(tmp_path, mini):
    asked = settings(tmp_path, mini, data={"path": str(many(tmp_path)), "held_out": 0.2})
    runs = {}
    for name, cache in (("memory", None), ("disk", str(tmp_path / "cache")), ("again", str(tmp_path / "cache"))):
        made = merge(asked, {"data.cache": cache, "run.dir": str(tmp_path / name)})
        sft.run(sft.SFTRecipe.model_validate(made))
        runs[name] = weights(tmp_path / name / "model")
    for name in ("disk", "again"):
        assert all(torch.equal(runs["memory"][k], runs[name][k]) for k in runs["memory"])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_stream_goes_on_from_a_checkpoint_in_its_middle(tmp_path, mini):
    """Also in the middle of a buffer, and in a later pass over the file."""
    data = {"path": str(many(tmp_path)), "stream": True, "buffer": 12, "on_too_long": "drop", "max_length": 20}
    asked = settings(tmp_path, mini, data=data, train={"batch_size": 4, "max_steps": 24})
    goes_on(asked, tmp_path, from_step=16)


def test_a_stream_of_a_mixture_goes_on_too(tmp_path, mini):
    more = {"data.mix": [3, 1], "data.stream": True, "data.buffer": 8, "train.max_steps": 16}
    goes_on(settings(tmp_path, mini, **more), tmp_path, from_step=10)


def test_pairs_in_packed_rows_learn_what_they_learn_apart(tmp_path, mini):
    """No answer sees another one in its row: the losses are the same, and so is what they lead to."""
    pairs = [
        {"prompt": f"ask{'?' * (i % 5)}", "chosen": w, "rejected": "no e" + " a" * (i % 3)}
        for i, w in enumerate(WORDS)
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    runs = []
    for pack in (0, 90):
        asked = {
            "model": {"path": str(mini)}, "data": {"path": str(data)}, "optimizer": {"lr": 0.01},
            "train": {"batch_size": 4, "epochs": 2, "pack": pack}, "samples": {"prompts": 0},
            "run": {"threads": 1, "dir": str(tmp_path / f"run{pack}")},
        }  # fmt: skip
        preference.run(preference.PreferenceRecipe.model_validate(asked))
        logged = rows_of(tmp_path / f"run{pack}" / "metrics.jsonl")
        runs.append([(row["loss"], row["margin"]) for row in logged if "loss" in row])
    assert len(runs[0]) == 6
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), rtol=1e-4, atol=1e-5)
