"""Recorded episodes become pairs and labels whose loss counts what the policy said and nothing else."""

from __future__ import annotations

import json

import pytest
from imitations import CHATML, save_chat
from train_kit import merge, recipe, rows

from steersman.data import Layout
from steersman.environments.lessons import episodes, labels, main, pairs
from steersman.types import SteersmanError
from steersman.verbs import feedback, preference, rl


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return str(save_chat(tmp_path_factory.mktemp("chat"), CHATML))


@pytest.fixture
def run(base, tmp_path, chat):
    """A run of a chat model in class Echo with two looks at its held-out prompts."""
    values = merge(
        base, {"model.path": chat, "optimizer.lr": 2e-2, "environment.max_tokens": 120,
               "run.eval_every": 1, "rollout.max_new_tokens": 6, "algorithm.beta": 0.0},
    )  # fmt: skip
    rl.run(recipe("rloo", values))
    return tmp_path / "run"


def test_pairs_and_labels_train_with_masks_on_what_the_environment_said(run, chat, tmp_path, capsys):
    from transformers import AutoTokenizer

    found = episodes(run)
    assert {len(row["talk"]) for row in found} == {5}  # three replies, two answers between them
    for row in found:
        said = [m["content"] for m in row["talk"] if m["role"] == "assistant"]
        heard = [m["content"] for m in row["talk"] if m["role"] == "user"]
        assert said == [t["said"] for t in row["turns"]]
        assert heard == [t["heard"] for t in row["turns"]][:2]
    tokenizer = AutoTokenizer.from_pretrained(chat)
    row = found[0]
    _, ids, mask = Layout(tokenizer).answer(row["asked"], row["talk"])
    counted = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=True)
    assert not any(t["heard"] in counted for t in row["turns"])
    for i, row in enumerate(found):  # whatever this model says, half of it is called good
        row["total"] = float(i % 2)
        row["talk"] = [{**m, "content": m["content"].strip() or "hm"} for m in row["talk"]]
    made = pairs(found)
    assert [row["margin"] for row in made] == [1.0] * 3
    assert pairs([{**row, "talk": found[0]["talk"]} for row in found]) == []
    verbs = ((preference, preference.PreferenceRecipe, made), (feedback, feedback.RECIPES["kto"], labels(found, 0.5)))
    for verb, kind, lines in verbs:
        path = tmp_path / f"{verb.__name__.rpartition('.')[2]}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        verb.run(_offline(kind, chat, path, tmp_path))
        assert rows(tmp_path / path.stem)
    assert main([str(run), str(tmp_path / "labels.jsonl"), "--above", "0.5"]) == 0
    assert "episodes" in capsys.readouterr().out


def write_run(folder, totals: dict[str, dict[str, float]], weights: dict[str, float]) -> None:
    """A run folder with one look: what was said, each with the parts of its reward."""
    asked = [{"role": "user", "content": "go"}]
    rows = [
        {"step": 0, "asked": asked, "talk": [{"role": "assistant", "content": said}], "reward": reward}
        for said, reward in totals.items()
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = "".join(f"    {name}: {{weight: {weight}}}\n" for name, weight in weights.items())
    (folder / "config.yaml").write_text(f"reward:\n  parts:\n{lines}")


def test_a_penalty_and_a_part_that_only_watches_count_as_in_the_run(tmp_path):
    said = {"long": {"won": 1.0, "length": 3.0, "gold": 0.0}, "short": {"won": 0.5, "length": 0.0, "gold": -9.0}}
    write_run(tmp_path, said, {"won": 1.0, "length": -1.0, "gold": 0.0})
    (pair,) = pairs(episodes(tmp_path))
    assert pair["chosen"][0]["content"] == "short"
    assert pair["rejected"][0]["content"] == "long"
    assert pair["margin"] == 0.5 - -2.0
    assert [row["label"] for row in labels(episodes(tmp_path), 0.0)] == [False, True]


def test_a_run_whose_weights_are_not_known_is_refused(tmp_path, capsys):
    write_run(tmp_path, {"a": {"won": 1.0}}, {"other": 1.0})
    with pytest.raises(SteersmanError, match=r"rewarded by 'won', and .*config.yaml has no such part"):
        episodes(tmp_path)
    (tmp_path / "config.yaml").unlink()
    assert main([str(tmp_path), str(tmp_path / "x.jsonl")]) == 2
    assert "there is no config.yaml" in capsys.readouterr().err


def _offline(kind, chat, path, tmp_path):
    return kind.model_validate(
        {
            "model": {"path": chat}, "data": {"path": str(path)},
            "train": {"epochs": 1, "batch_size": 2}, "run": {"dir": str(tmp_path / path.stem), "threads": 1},
        }
    )  # fmt: skip


def test_a_run_without_episodes_is_refused(tmp_path):
    with pytest.raises(SteersmanError, match=r"there is no samples.jsonl"):
        episodes(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"step": 0, "index": 0}\n')
    with pytest.raises(SteersmanError, match="holds no episodes"):
        episodes(tmp_path)
    (tmp_path / "samples.jsonl").write_text("{\n")
    assert main([str(tmp_path), str(tmp_path / "x.jsonl")]) == 2


def test_episodes_with_any_line_break_are_read_and_a_missing_folder_is_told(tmp_path, capsys):
    said = [{"role": "assistant", "content": "one\u2028two"}]
    row = {"step": 0, "asked": [{"role": "user", "content": "go"}], "talk": said, "reward": {"play": 1.0}}
    text = json.dumps(row, ensure_ascii=False)
    (tmp_path / "config.yaml").write_text("reward: {parts: {play: {weight: 1.0}}}")
    (tmp_path / "samples.jsonl").write_text(f"{text}\n{text[:40]}", encoding="utf-8")  # the last one cut by a kill
    assert labels(episodes(tmp_path), 0.5) == [{"prompt": row["asked"], "completion": said, "label": True}]
    assert main([str(tmp_path), str(tmp_path / "none" / "x.jsonl")]) == 2
    assert "there is no folder" in capsys.readouterr().err
