"""Models that do not fit, or whose vocabulary is padded, as the command line meets them."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from letter_models import LETTERS, letters, rows_of, save_mini, write_jsonl
from train_kit import merge, settings
from transformers import AutoConfig, AutoModelForCausalLM

from steersman import cli

MORE = 16


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model that scores 16 ids more than its tokenizer has, and likes them."""
    folder = save_mini(tmp_path_factory.mktemp("padded"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(LETTERS) + MORE, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[len(LETTERS) :] = 3 * model.lm_head.weight[5:6]
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("verb", ["sft", "dpo", "grpo", "reward", "generate"])
@pytest.mark.parametrize(("family", "why"), [("rwkv", "no attention"), ("bloom", "ALiBi")])
def test_a_family_that_does_not_fit_is_refused_before_a_run_folder_is_made(verb, family, why, tmp_path, capsys):
    folder = tmp_path / "model"
    AutoConfig.for_model(family).save_pretrained(folder)  # its weights are not even looked for
    letters().save_pretrained(folder)
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    text = {"prompt": "a", "completion": "b"}
    data = write_jsonl(tmp_path / "rows.jsonl", [pair if verb in ("dpo", "reward") else text] * 4)
    where = [] if verb == "generate" else ["--run.dir", str(tmp_path / "run")]
    parts = ["--reward.parts", "{long: {builtin: distinct_n}}"] if verb == "grpo" else []
    assert cli.main([verb, "--model.path", str(folder), "--data.path", str(data), *where, *parts]) == 2
    assert f"models of type '{family}' are not supported: " in (error := capsys.readouterr().err)
    assert why in error
    assert not (tmp_path / "run").exists()


def test_generate_never_writes_what_pads_a_vocabulary(padded, tmp_path):
    out = tmp_path / "out.jsonl"
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}, {"prompt": "a dog"}])
    words = ["--model.path", str(padded), "--data.path", str(data), "--out", str(out), "--run.threads", "1"]
    assert cli.main(["generate", *words, "--rollout.samples", "8", "--rollout.max_new_tokens", "12"]) == 0
    rows, known = rows_of(out), letters()
    written = [len(known.encode(row["completion"], add_special_tokens=False)) for row in rows]
    unseen = sum(row["tokens"] - (row["finish"] == "eos") - n for row, n in zip(rows, written, strict=True))
    assert unseen < 0.1 * sum(written)  # the text shows no special tokens; padding alone would be most of it


@pytest.mark.parametrize("verb", ["rloo", "ppo", "grpo"])
def test_training_takes_the_probabilities_that_were_sampled_from(verb, padded, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merge(settings(tmp_path, padded), {"rollout.max_new_tokens": 12})))
    assert cli.main([verb, str(recipe)]) == 0
    rows = [row for row in rows_of(tmp_path / "run/metrics.jsonl") if "ratio_gap" in row]
    assert len(rows) == 2
    assert max(row["ratio_gap"] for row in rows) < 1e-4
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["vocab_size"] == len(LETTERS) + MORE
