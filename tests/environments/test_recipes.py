"""The recipes of each interface train, on a tiny model and fewer samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from train_kit import merge, rows

from steersman.verbs import rl
from steersman.verbs.on_policy_recipes import RECIPES

FOLDER = Path(__file__).parents[2] / "recipes" / "environments"
SMALL = {
    "rollout.prompts": 2, "rollout.samples": 2, "rollout.held_out": 2, "iterations": 1, "run.threads": 1,
    "environment.max_tokens": 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "method"),
    [("tools", "grpo"), ("class", "grpo"), ("text", "ppo"), ("frozen-lake", "ppo"), ("dialogue", "grpo")],
)
def test_recipe(name, method, tmp_path, mini, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    values = merge(values, {**SMALL, "model.path": str(mini), "run.dir": str(tmp_path / "run")})
    if name in ("tools", "class", "dialogue"):
        values["rollout"]["max_new_tokens"] = 8
    rl.run(RECIPES[method].model_validate(values))
    seen = rows(tmp_path / "run")[-1]
    assert seen["episode/turns"] >= 1
    assert seen["ratio_gap"] < 1e-4
