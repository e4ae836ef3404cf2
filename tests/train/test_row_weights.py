"""The column `weight`: negative ones are bad rows, and a batch that weighs nothing teaches nothing."""

from __future__ import annotations

import math

import pytest
import torch
from letter_models import WORDS, write_jsonl
from train_kit import rows

from steersman.types import SteersmanError
from steersman.verbs import feedback, preference, reward_model
from steersman.verbs.preference import PreferenceRecipe
from steersman.verbs.reward_model import RewardModelRecipe

VERBS = {
    "dpo": (preference.run, PreferenceRecipe, "pairs"),
    "kto": (feedback.run, feedback.RECIPES["kto"], "thumbs"),
    "reward of pairs": (reward_model.run, RewardModelRecipe, "pairs"),
    "reward of thumbs": (reward_model.run, RewardModelRecipe, "thumbs"),
}


def trained(verb, given, tmp_path, mini):
    run, recipe, kind = VERBS[verb]
    said = [
        {"chosen": WORDS[i % 12], "rejected": WORDS[(i + 3) % 12]}
        if kind == "pairs"
        else {"completion": WORDS[i % 12], "label": i % 2 == 0}
        for i in range(len(given))
    ]
    data = [{"prompt": f"a{'?' * i}", "weight": w, **row} for i, (w, row) in enumerate(zip(given, said, strict=True))]
    values = {
        "model": {"path": str(mini)},
        "data": {"path": str(write_jsonl(tmp_path / "rows.jsonl", data))},
        "train": {"batch_size": 2},
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
    }
    run(recipe.model_validate(values))
    return rows(tmp_path / "run")


@pytest.mark.parametrize("verb", VERBS)
def test_a_batch_that_weighs_nothing_teaches_nothing(verb, tmp_path, mini):
    seen = trained(verb, [0, 0, 0, 0], tmp_path, mini)
    assert [row["loss"] for row in seen if row["step"]] == [0.0, 0.0]
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] == 0 for row in seen if "grad_norm" in row)


@pytest.mark.parametrize("verb", VERBS)
def test_a_negative_weight_is_a_bad_row(verb, tmp_path, mini):
    with pytest.raises(SteersmanError, match=r"rows\.jsonl, line 2, field 'weight': must be at least 0, not -1"):
        trained(verb, [1, -1, 1, 1], tmp_path, mini)


def test_the_gate_of_several_attributes_divides_by_no_zero():
    from steersman.objectives.batch import weight_of

    class Row:
        def __init__(self, weight):
            self.weight = weight

    rows: list = [Row(0.0), Row(0.0), Row(2.0)]
    assert [weight_of(rows, [0, 1]), weight_of(rows, [1, 2])] == [1.0, 2.0]
    assert torch.isfinite(torch.tensor(0.0) / weight_of(rows, [0]))
