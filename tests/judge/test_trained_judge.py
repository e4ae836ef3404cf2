"""A judge that writes its verdict, trained on people's pairs: questions in both orders, reward, what it learns."""

from __future__ import annotations

import pytest
from letter_models import rows_of, save_mini, write_jsonl

from steersman.flywheel import judge_lessons
from steersman.judge.reward import agreement
from steersman.types import SteersmanError
from steersman.verbs import rl, sft
from steersman.verbs.on_policy_recipes import RECIPES

PAIRS = [
    {"prompt": "say", "chosen": "good {x}", "rejected": "bad"},
    {"prompt": "say it", "chosen": "yes", "rejected": "no", "votes": [1, 0, 0]},
    {"prompt": "say so", "chosen": "a", "rejected": "b", "votes": [1, 0]},
]


def lessons(tmp_path, **settings):
    data = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    values = {"data": {"path": str(data), "ties": "keep"}, "out": str(tmp_path / "asked.jsonl"), **settings}
    made = judge_lessons.run(judge_lessons.JudgeLessonsRecipe.model_validate(values))
    return made, rows_of(tmp_path / "asked.jsonl")


def test_every_pair_is_asked_in_both_orders_and_ties_are_not(tmp_path):
    made, rows = lessons(tmp_path, compare="{rubric}|{prompt}|{first}|{second}", rubric="how")
    assert made == {"questions": 4}
    assert [(r["prompt"], r["winner"], r["pair"]) for r in rows] == [
        ("how|say|good {x}|bad", "A", 0),
        ("how|say|bad|good {x}", "B", 0),
        ("how|say it|yes|no", "B", 1),
        ("how|say it|no|yes", "A", 1),
    ]


def test_the_reward_is_the_verdicts_agreement():
    told = ["I weigh. [[A]]", "[[B]]", "A", "[[C]]", "no idea", "[[A]]\nbut then [[B]]", "[[A]] or [[B]]"]
    assert agreement([""] * 7, told, winner=["A", "A", "A", "B", "A", "B", "B"]) == [1, 0, 1, 0, -0.5, 1, -0.5]
    assert agreement([""], ["hm"], winner=["A"], unreadable=-2) == [-2]
    with pytest.raises(SteersmanError, match="winner is 'C' in row 0"):
        agreement([""], ["A"], winner=["C"])


def test_a_template_without_both_answers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \{second\}"):
        lessons(tmp_path, compare="{first}")
    with pytest.raises(SteersmanError, match="holds no pairs out"):
        lessons(tmp_path, held_out=str(tmp_path / "held.jsonl"))


@pytest.mark.slow
def test_grpo_trains_it_to_agree(tmp_path):
    """A mini model that has learned to give a verdict, either one, learns to give the one that people gave."""
    pairs = [{"prompt": "x" * (1 + i % 5), "chosen": "y", "rejected": "n"} for i in range(5)]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    recipe = {"data": {"path": str(data)}, "out": str(tmp_path / "asked.jsonl"), "compare": "{prompt}{first}{second}"}
    judge_lessons.run(judge_lessons.JudgeLessonsRecipe.model_validate(recipe))
    either = [{"prompt": r["prompt"], "completion": v} for r in rows_of(tmp_path / "asked.jsonl") for v in "ab"]
    begun = {
        "model": {"path": str(save_mini(tmp_path / "mini", 0))},
        "data": {"path": str(write_jsonl(tmp_path / "either.jsonl", either)), "append_eos": False},
        "train": {"batch_size": 20, "max_steps": 30, "epochs": 30}, "optimizer": {"lr": 0.03},
        "run": {"dir": str(tmp_path / "sft"), "threads": 1, "eval_every": 99, "save_every": 99},
    }  # fmt: skip
    model = sft.run(sft.SFTRecipe.model_validate(begun))["model"]
    values = {
        "model": {"path": model},
        "data": {"path": str(tmp_path / "asked.jsonl")},
        "reward": {"parts": {"agreement": {"function": "steersman.judge.reward:agreement"}}},
        "rollout": {"prompts": 10, "samples": 16, "max_new_tokens": 1, "held_out": 10},
        "algorithm": {"beta": 0.0}, "optimizer": {"lr": 0.01}, "iterations": 30,
        "run": {"dir": str(tmp_path / "run"), "threads": 1, "eval_every": 30, "save_every": 30},
        "health": {"expect_eos": False},
    }  # fmt: skip
    summary = rl.run(RECIPES["grpo"].model_validate(values))
    assert summary["reward/total_before"] < 0.7
    assert summary["reward/total_after"] == 1
