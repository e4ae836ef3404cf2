"""`export` gives the numbers that were trained; `import-recipe` maps or names every setting of a peer's file."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from letter_models import save_mini, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from steersman import cli
from steersman.config.load import load_recipe
from steersman.model import load_policy, load_reward
from steersman.types import Tokens
from steersman.verbs.import_recipe import VERBS, translate_settings

TOKENS = Tokens.from_ids([[5, 6, 7]], [[9, 10]])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapters of a policy and of a reward model, trained by the verbs."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_mini(folder / "base")
    rows = {"sft": {"completion": "a cat"}, "reward": {"chosen": "a cat", "rejected": "no"}}
    for verb, answer in rows.items():
        data = write_jsonl(folder / f"{verb}.jsonl", [{"prompt": f"hm{'?' * i}", **answer} for i in range(6)])
        words = [
            "--model.path",
            str(base),
            "--model.lora",
            "{r: 2}",
            "--model.merge",
            "false",
            "--optimizer.lr",
            "0.05",
        ]
        assert cli.main([verb, *words, "--data.path", str(data), "--train.batch_size", "2", "--run.dir",
                         str(folder / verb), "--run.threads", "1"]) == 0  # fmt: skip
    return folder


def test_adapters_become_a_plain_model_in_the_precision_asked_for(adapters, tmp_path):
    assert cli.main(["export", str(adapters / "sft" / "model"), "--out", str(tmp_path / "m")]) == 0
    plain, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), load_policy(adapters / "sft" / "model")
    ids = torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours.model(ids).logits, atol=1e-5, rtol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(adapters / "base")
        assert not torch.allclose(base(ids).logits, plain(ids).logits, atol=1e-3)
    half = ["--out", str(tmp_path / "half"), "--dtype", "bfloat16"]
    assert cli.main(["export", str(adapters / "sft" / "model"), *half]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_a_reward_model_s_adapters_become_a_plain_classifier(adapters, tmp_path):
    assert cli.main(["export", str(adapters / "reward" / "model"), "--out", str(tmp_path / "rm")]) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    with torch.no_grad():
        found, expected = (
            plain(torch.tensor([[5, 6, 7, 9, 10]])).logits[:, 0],
            load_reward(adapters / "reward" / "model").score(TOKENS),
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_can_not_be_exported_is_refused(adapters, tmp_path, capsys):
    assert cli.main(["export", str(adapters / "base"), "--out", str(adapters / "base")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["export", str(adapters / "base"), "--out", str(tmp_path / "x"), "--form", "adapters"]) == 2
    assert "holds no adapters alone" in capsys.readouterr().err


LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen2.5-0.5B
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
quantization_bit: 4
dataset: dpo_en_demo
template: qwen
cutoff_len: 2048
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
output_dir: saves/dpo
report_to: none
"""


def test_a_file_of_llama_factory(tmp_path, capsys):
    file, out = tmp_path / "dpo.yaml", tmp_path / "ours.yaml"
    file.write_text(LLAMA_FACTORY)
    assert cli.main(["import-recipe", str(file), "--out", str(out)]) == 0
    text = out.read_text()
    assert yaml.safe_load(text) == {
        "model": {"path": "Qwen/Qwen2.5-0.5B", "dtype": "bfloat16", "quantise": "nf4",
                  "lora": {"r": 8, "targets": "all-linear"}},
        "loss": {"name": "dpo", "settings": {"beta": 0.1}},
        "data": {"path": "dpo_en_demo", "max_length": 2048},
        "train": {"batch_size": 16, "epochs": 3.0},  # LLaMA-Factory's own number of epochs
        "optimizer": {"lr": 5e-6, "schedule": "cosine", "warmup": 0.1},
        "run": {"dir": "saves/dpo", "sinks": []},
    }  # fmt: skip
    assert "# template: texts of turns are laid out by the model's own chat template" in text
    load_recipe(VERBS["dpo"], out)
    assert cli.main(["import-recipe", str(file), "--out", str(out)]) == 2
    assert f"{out} is there already" in capsys.readouterr().err


def test_a_file_of_trl_and_a_command_of_openrlhf(tmp_path, capsys):
    file = tmp_path / "grpo.json"
    file.write_text(json.dumps({
        "model_name_or_path": "m", "num_generations": 8, "max_completion_length": 64, "beta": 0.04, "epsilon": 0.2,
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "optim": "adamw_bnb_8bit",
        "reward_funcs": ["r.py:f"], "use_vllm": True, "num_train_epochs": 1, "lr_scheduler_type": "polynomial",
    }))  # fmt: skip
    assert cli.main(["import-recipe", str(file)]) == 0
    told = capsys.readouterr().out
    found = yaml.safe_load(told)
    assert found["rollout"] == {
        "samples": 8, "max_new_tokens": 64, "prompts": 4, "recompute_logp": True,
        "correction": {"kind": "sequence_masked", "cap": 3.0},
    }  # fmt: skip
    assert found["algorithm"] == {"beta": 0.04, "clip_low": 0.2, "clip_high": 0.2, "average": "token"}
    assert found["optimizer"] == {"kind": "adamw-8bit", "lr": 1e-6}
    assert found["reward"] == {"parts": {"score0": {"function": "r.py:f"}}}
    assert "iterations" not in found
    for name in ("use_vllm", "num_train_epochs", "lr_scheduler_type"):
        assert f"# {name}: " in told
    script = tmp_path / "train.sh"
    script.write_text(
        "python -m openrlhf.cli.train_sft \\\n --pretrain m --learning_rate 5e-6 --bf16 --packing # x\n"
    )
    assert cli.main(["import-recipe", str(script)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("# steersman sft")
    assert yaml.safe_load(told)["model"] == {"path": "m", "dtype": "bfloat16"}


def test_every_setting_is_mapped_or_named():
    settings = {"learning_rate": 1e-5, "made_up": 3, "optim": "sgd", "loss_type": "nothing", "load_in_4bit": False}
    keys, left = translate_settings(settings, "dpo")
    assert keys == {"optimizer.lr": 1e-5}
    assert set(left) == {"made_up", "optim", "loss_type"}


REPEATED = "a0: &a0 [x]\nbeta: 1\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
"""Nine lines that stand for 400 million values."""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n- 2", "holds no settings"), ("a: [", "can not be read"), ("lr: 1", "nothing in the file"),
        ("beta: &a [*a]", "it contains itself"), ("beta: " + "7" * 5000, "the largest there is"),
        (REPEATED, "is one alias repeated"),
    ],
)  # fmt: skip
def test_files_that_are_no_settings_are_refused(text, said, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text(text)
    assert cli.main(["import-recipe", str(file)]) == 2
    assert said in capsys.readouterr().err
