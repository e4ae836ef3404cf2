"""The loops learn: what must be easy is learned within seconds, and a runaway is named while it happens."""

from __future__ import annotations

import json

import pytest
import torch
from letter_models import write_jsonl
from train_kit import merge, recipe, rows
from transformers import AutoModelForCausalLM

from steersman.verbs import reward_model, rl, sft

SENTENCES = ["the cat sat on a mat.", "we go home now.", "look, a red sun!", "is it you?"]


@pytest.mark.slow
def test_sft_learns_four_sentences_by_heart(tmp_path, mini):
    taught = [{"prompt": cue, "completion": text} for cue, text in zip("abcd", SENTENCES, strict=True)]
    data = write_jsonl(tmp_path / "four.jsonl", taught)
    settings = {
        "model": {"path": str(mini), "scratch": {
            "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}},
        "data": {"path": str(data)}, "train": {"batch_size": 4, "epochs": 160},
        "optimizer": {"lr": 0.01, "warmup": 5},
        "run": {"dir": str(tmp_path / "run"), "threads": 1, "save_every": 1000, "eval_every": 1000},
    }  # fmt: skip
    sft.run(sft.SFTRecipe.model_validate(settings))
    found = rows(tmp_path / "run")
    assert found[1]["loss"] > 2
    assert found[-1]["loss"] < 0.1
    # and the model on disk says them, their end included
    from transformers import AutoTokenizer

    folder = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for cue, sentence in zip("abcd", SENTENCES, strict=True):
        ids = torch.tensor([tokenizer(cue, add_special_tokens=False)["input_ids"]])
        out = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=2)[0].tolist()
        assert out[-1] == 2
        assert tokenizer.decode(out[1:-1]) == sentence


def test_a_reward_model_tells_two_clear_classes_apart(tmp_path, mini):
    good, bad = "aeiou", "xzqkw"
    pairs = [
        {
            "prompt": "say",
            "chosen": good[i % 5] * (2 + i % 4) + "mn"[i % 2],
            "rejected": bad[i % 5] * (2 + i % 3) + "m",
        }
        for i in range(60)
    ]
    settings = {
        "model": {"path": str(mini)}, "data": {"path": str(write_jsonl(tmp_path / "p.jsonl", pairs)), "held_out": 0},
        "train": {"batch_size": 12, "epochs": 8, "keep": "last"}, "optimizer": {"lr": 0.02},
        "run": {"dir": str(tmp_path / "run"), "threads": 1, "save_every": 1000, "eval_every": 1000},
    }  # fmt: skip
    reward_model.run(reward_model.RewardModelRecipe.model_validate(settings))
    found = rows(tmp_path / "run")
    # the head starts at zero: every score is 0 and the loss is log 2
    assert found[1]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert found[-1]["loss"] < 0.1
    assert found[-1]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("name", "own"),
    [
        pytest.param("ppo", {"critic.optimizer": {"lr": 0.02}}, marks=pytest.mark.slow),
        ("grpo", {"rollout.samples": 4}),
        ("rloo", {"rollout.samples": 4, "optimizer.lr": 0.02}),
        pytest.param("ppo", {"critic.init": "shared"}, marks=pytest.mark.slow),
    ],
)
def test_a_simple_reward_is_learned_in_seconds(name, own, base, tmp_path):
    asked = merge(
        base,
        {
            "rollout.prompts": 12, "rollout.samples": 3, "rollout.held_out": 0, "iterations": 25,
            "run.save_every": 1000, "run.eval_every": 1000, "optimizer.lr": 0.01, "algorithm.beta": 0.0,
        }
        | own,
    )  # fmt: skip
    rl.run(recipe(name, asked))
    found = rows(tmp_path / "run")[1:]
    early = sum(r["reward/total"] for r in found[:3]) / 3
    late = sum(r["reward/total"] for r in found[-3:]) / 3
    assert late > 4 * early + 0.3, (early, late)
    assert max(r["ratio_gap"] for r in found) < 1e-3


def test_a_strong_kl_term_holds_the_policy_and_a_weak_one_does_not(base, tmp_path):
    gone = {}
    for beta in (0.0, 3.0):
        asked = merge(
            base,
            {
                "rollout.prompts": 12, "rollout.samples": 3, "iterations": 15,
                "run.save_every": 1000, "run.eval_every": 1000, "optimizer.lr": 0.01, "algorithm.beta": beta,
                "run.dir": str(tmp_path / f"{beta}"),
            },
        )  # fmt: skip
        gone[beta] = rl.run(recipe("rloo", asked))["kl_after"]
    assert gone[0.0] > 5 * max(gone[3.0], 0.02)


@pytest.mark.slow
def test_the_runaway_is_named_while_it_happens(shared, tmp_path):
    """A group-relative run with a weak KL term toward VADER's score ends in repetition; the watch says so."""
    openings = [
        "Once upon a time, there was a",
        "One day, a little",
        "Tom and Lily",
        "The dog",
        "A small cat",
        "Sara had a",
    ]
    settings = {
        "model": {"path": str(shared / "stories260k" / "hf")},
        "data": {"path": str(write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p} for p in openings]))},
        "reward": {"parts": {"mood": {"builtin": "vader_sentiment"}}},
        "rollout": {"prompts": 6, "samples": 8, "max_new_tokens": 40, "held_out": 2},
        "algorithm": {"beta": 0.001},
        "optimizer": {"lr": 3e-3},
        "iterations": 40,
        "run": {"dir": str(tmp_path / "run"), "threads": 1, "save_every": 1000, "eval_every": 1000},
    }
    summary = rl.run(recipe("grpo", settings))
    found = rows(tmp_path / "run")[1:]
    assert sum(r["reward/total"] for r in found[-3:]) / 3 > 0.8
    named = [json.loads(line) for line in (tmp_path / "run" / "health.jsonl").read_text().splitlines()]
    codes = {f["code"]: f["step"] for f in named}
    assert {"repetition", "same_answer", "entropy_collapse", "kl_runaway"} & set(codes), codes
    assert "repetition" in codes, (codes, summary)
    assert codes["repetition"] < 40
