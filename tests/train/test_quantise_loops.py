"""QLoRA through the verbs: a 4-bit base under sft, dpo and grpo; what can not be trained is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from letter_models import write_jsonl
from train_kit import merge, recipe, rows

from steersman import cli
from steersman.verbs import rl

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_loop_learns_on_a_4_bit_base_with_a_first_ratio_of_one(name, base):
    extra = {"model.quantise": "nf4", "model.lora": {"r": 2}} | ({"share": "base"} if name == "ppo" else {})
    asked = recipe(name, merge(base, extra))
    rl.run(asked)
    gaps = [row["ratio_gap"] for row in rows(Path(asked.run.dir)) if "ratio_gap" in row]
    assert gaps
    assert max(gaps) < 1e-3


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_offline_verbs_take_it_and_refuse_to_train_it_whole(verb, tmp_path, mini, capsys):
    answer = {"completion": "yes"} if verb == "sft" else {"chosen": "yes", "rejected": "no"}
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"a{'?' * i}", **answer} for i in range(6)])
    words = [verb, "--model.path", str(mini), "--model.quantise", "nf4", "--data.path", str(data),
             "--run.dir", str(tmp_path / "run"), "--train.batch_size", "2"]  # fmt: skip
    assert cli.main(words) == 2
    assert "quantised weights can not be trained" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*words, "--model.lora", "{r: 2, dora: true}"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_dropout_is_refused_where_ratios_are_taken(base, tmp_path):
    with pytest.raises(ValueError, match=r"model\.lora\.dropout"):
        recipe("ppo", merge(base, {"model.lora": {"r": 2, "dropout": 0.1}}))
