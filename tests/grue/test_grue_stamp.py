"""What a cell was made with is compared with what the recipe asks for now."""

from __future__ import annotations

import json
from typing import Any

import pytest
from grue_kit import settings

from steersman.grue.cells import Cell, check_stamp
from steersman.grue.check import check_matrix
from steersman.grue.recipe import GrueRecipe
from steersman.types import SteersmanError

PARTS = {"rougeL": {"metric": "rougeL"}, "short": {"builtin": "length", "args": {"target": 12}, "weight": 0.2}}


def matrix(folder, **more: Any) -> list[Cell]:
    _, _, every = check_matrix(GrueRecipe.model_validate(settings(folder, **more)))
    return every


def mark(cells: list[Cell]) -> None:
    """Leaves behind what cells leave that ran."""
    for cell in cells:
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / "cell.json").write_text(json.dumps(cell.stamp))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            {"per_task": {"colours": {"reward": PARTS}}},
            {"per_task": {"colours": {"reward": {"rougeL": PARTS["rougeL"]}}}},
            r"was made with judged.reward.short.\w+ .*, and the recipe now has none",
        ),
        (
            {"generation": {"top_p": 0.5}},
            {},
            r"was made with judged.generation.top_p 0.5, and the recipe now has none",
        ),
        (
            {},
            {"generation": {"top_p": 0.5}},
            r"was made without judged.generation.top_p, and the recipe now asks for 0.5",
        ),
        (
            {},
            {"evaluation": {"msttr_segment": 6}},
            r"was made with judged.msttr_segment 5, and the recipe now asks for 6",
        ),
    ],
)
def test_a_setting_that_is_taken_away_given_or_changed_is_refused_by_name(before, after, told, tmp_path):
    mark(matrix(tmp_path, **before))
    with pytest.raises(SteersmanError, match=told):
        matrix(tmp_path, seeds=[0, 1], **after)
    assert len(matrix(tmp_path, seeds=[0, 1], **before)) == 6


def test_a_matrix_older_than_a_recipe_key_goes_on_where_the_key_has_its_default(tmp_path):
    every = matrix(tmp_path)
    mark(every)
    (trained,) = (cell for cell in every if cell.verb == "grpo")
    stamp = json.loads(json.dumps(trained.stamp))
    assert stamp["recipe"]["rollout"].pop("min_p") == 0.0
    (trained.folder / "cell.json").write_text(json.dumps(stamp))
    assert len(matrix(tmp_path, seeds=[0, 1])) == 6
    stamp["recipe"]["rollout"]["min_p"] = 0.1
    (trained.folder / "cell.json").write_text(json.dumps(stamp))
    with pytest.raises(SteersmanError, match=r"with recipe.rollout.min_p 0.1, and the recipe now asks for 0.0"):
        check_stamp(trained)
