"""Labels of steps from rollouts: shares of continuations that end well, read back by the verb that learns of them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from letter_models import WORDS, letters, rows_of, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

from steersman.data import DataConfig
from steersman.data.load import steps as load_steps
from steersman.flywheel.players import Player, load_queries
from steersman.flywheel.steps import Maker, StepLabelsRecipe, run
from steersman.judge.scored import Scorer
from steersman.model import step_ends
from steersman.types import SteersmanError

LEFT_OUT = ("cut", "without_steps", "too_many_steps", "steps_within_a_token")


def recipe(tmp_path, mini_model, **extra) -> StepLabelsRecipe:
    rows = write_jsonl(tmp_path / "p.jsonl", [{"prompt": w, "answer": "a"} for w in WORDS])
    (tmp_path / "r.py").write_text(
        "def has(prompts, completions, answer):\n    return [float(a in c) for a, c in zip(answer, completions)]\n"
    )
    return StepLabelsRecipe.model_validate(
        {
            "model": {"path": str(mini_model)},
            "data": {"path": str(rows), "step_separator": " "},
            "reward": {"right": {"function": f"{tmp_path / 'r.py'}:has"}},
            "rollout": {"prompts": 12, "samples": 6, "max_new_tokens": 16},
            "continuations": 4,
            "run": {"dir": str(tmp_path / "run"), "threads": 1},
            **extra,
        }
    )  # fmt: skip


def test_rows_hold_shares_of_right_continuations_and_are_loaded(tmp_path, mini_model):
    told = run(recipe(tmp_path, mini_model))
    rows = rows_of(tmp_path / "run/steps.jsonl")
    assert told["data/rows"] == len(rows) > 3
    for row in rows:
        assert len(row["steps"]) == len(row["labels"])
        assert all(4 * x == int(4 * x) for x in row["labels"])
        assert row["labels"][-1] == float("a" in " ".join(row["steps"]))
        # once the letter stands there, nothing that follows can take it away
        for k in range(len(row["steps"])):
            if "a" in " ".join(row["steps"][: k + 1]):
                assert row["labels"][k] == 1
    assert any(0 < x < 1 for row in rows for x in row["labels"])
    loaded = load_steps(DataConfig(path=told["data"], step_separator=" "))
    assert len(loaded.train) == len(rows)


def test_a_resumed_run_labels_nothing_twice_and_ends_alike(tmp_path, mini_model, monkeypatch, capsys):
    whole = run(recipe(tmp_path, mini_model))
    made, label = [], Maker.label_steps

    def dies(self, answers, span, progress):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(span)
        return label(self, answers, span, progress)

    again = recipe(tmp_path, mini_model, run={"dir": str(tmp_path / "cut"), "threads": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Maker, "label_steps", dies)
        patch.setattr("steersman.flywheel.steps.piece_size", lambda rollout, n: 3)
        with pytest.raises(KeyboardInterrupt):
            run(again)
    assert "what was made before it is kept, and --resume goes on" in " ".join(capsys.readouterr().out.split())
    cut = run(again, resume=True)
    assert rows_of(tmp_path / "cut/steps.jsonl") == rows_of(tmp_path / "run/steps.jsonl")
    assert cut["label/mean"] == whole["label/mean"]


def test_answers_of_too_many_steps_and_recipes_without_a_reward_are_told(tmp_path, mini_model):
    with pytest.raises(ValueError, match="no reward given"):
        recipe(tmp_path, mini_model, reward={})
    sharp = {"path": str(tmp_path / "p.jsonl"), "step_separator": "#"}
    told = run(recipe(tmp_path, mini_model, data=sharp))
    assert told["steps"] == 1
    none = recipe(tmp_path, mini_model, most_steps=1, run={"dir": str(tmp_path / "none"), "threads": 1})
    answers = [a for a in _maker(none).answers(range(12), lambda *told: None) if len(a["steps"]) == 1]
    if answers:
        assert run(none)["steps"] == 1
    else:
        with pytest.raises(SteersmanError, match="has 1 to 1 steps"):
            run(none)


def test_what_the_length_limit_and_most_steps_leave_out_is_counted(tmp_path, mini_model, capsys):
    told = run(recipe(tmp_path, mini_model, most_steps=2))
    answers, rows = rows_of(tmp_path / "run/answers.jsonl"), rows_of(tmp_path / "run/steps.jsonl")
    whole = [a for a in answers if not a.get("cut")]
    assert told["data/sampled"] == len(answers) == 72
    assert told["data/cut"] == 72 - len(whole) > 0
    assert told["data/answers"] == len(whole)
    assert told["data/too_many_steps"] == sum(len(a["steps"]) > 2 for a in whole)
    left_out = {name: told[f"data/{name}"] for name in LEFT_OUT}
    assert told["data/rows"] == len(rows) == 72 - sum(left_out.values())
    assert json.loads((tmp_path / "run/steps.provenance.json").read_text())["left_out"] == left_out
    continued = sum(4 * (len(row["steps"]) - 1) for row in rows)
    assert 0 < told["continuations/cut"] == sum(row["continuations_cut"] for row in rows) / continued < 1
    said = " ".join(capsys.readouterr().out.split())
    assert "of the answers, which are left out: the data are the short answers" in said
    assert "of the continuations, which are scored as far as they went" in said
    fewer = run(recipe(tmp_path, mini_model, most_steps=1, run={"dir": str(tmp_path / "fewer"), "threads": 1}))
    assert fewer["data/too_many_steps"] == sum(len(a["steps"]) > 1 for a in whole) > 0


def test_rows_are_the_answers_word_for_word_and_continuations_begin_behind_their_text(tmp_path):
    """A model that says each of six tokens equally often writes blank steps and several separators in a row."""
    vocabulary = ["<unk>", "<s>", "</s>", "a", "b", " "]
    config = LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    model, tokenizer = LlamaForCausalLM(config), letters(vocabulary=vocabulary)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(tmp_path / "even")
    tokenizer.save_pretrained(tmp_path / "even")
    asked = recipe(tmp_path, tmp_path / "even")
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a" * n, "answer": "a"} for n in range(1, 13)])
    (tmp_path / "r.py").write_text(
        "def has(prompts, completions):\n"
        f"    with open({str(tmp_path / 'seen')!r}, 'a') as seen:\n"
        "        seen.write(''.join(c + '#' for c in completions))\n"
        "    return [1.0 for c in completions]\n"
    )
    run(asked)
    rows = rows_of(tmp_path / "run/steps.jsonl")
    answers = [a["text"] for a in rows_of(tmp_path / "run/answers.jsonl") if not a.get("cut") and a["text"].strip()]
    assert [" ".join(row["steps"]) for row in rows] == answers
    assert sum("  " in text.strip() for text in answers) > 3
    seen = iter((tmp_path / "seen").read_text().split("#"))
    for row, text in zip(rows, answers, strict=True):
        assert next(seen) == text
        ends = [end.end() for end in re.finditer("[ab] ", text)][: len(row["steps"]) - 1]
        assert [next(seen).startswith(text[:end]) for end in ends for _ in range(4)] == [True] * 4 * len(ends)
    for example in load_steps(DataConfig(path=str(tmp_path / "run/steps.jsonl"), step_separator=" ")).train:
        ids = tokenizer.encode(example.completion, add_special_tokens=False)
        assert len(step_ends(tokenizer, ids, " ")) == len(example.labels)


def test_answers_that_are_all_cut_are_told(tmp_path, mini_model):
    short = {"prompts": 4, "samples": 2, "max_new_tokens": 2, "min_new_tokens": 2}
    with pytest.raises(SteersmanError, match=r"cut every answer.*raise rollout.max_new_tokens \(2\)"):
        run(recipe(tmp_path, mini_model, rollout=short))


def _maker(asked: StepLabelsRecipe) -> Maker:
    device = torch.device("cpu")
    queries, _ = load_queries(asked.data, 0, wrap=False)
    return Maker(asked, Player(asked.model, asked.run, device), queries, Scorer(asked.reward, device))
