"""How many tokens go through a model at once where the recipe does not say: by the recipe's own device."""

from __future__ import annotations

import pytest
import torch

from steersman.config.dump import dump_recipe
from steersman.config.load import load_recipe
from steersman.grue.recipe import GrueRecipe
from steersman.verbs.sft import SFTRecipe

SFT = ["--model.path", "m", "--data.path", "d"]
GRUE = ["--model.path", "m", "--data.folder", "d"]


@pytest.mark.parametrize(("recipe", "needed"), [(SFTRecipe, SFT), (GrueRecipe, GRUE)])
@pytest.mark.parametrize("cuda", [True, False])
def test_the_recipes_device_decides(recipe, needed, cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)

    def tokens(*more: str) -> int:
        return load_recipe(recipe, None, [*needed, *more]).run.micro_tokens

    assert tokens("--run.device", "cpu") == 2048
    assert tokens("--run.device", "cuda:0") == 16384
    assert tokens() == tokens("--run.device", "auto") == (16384 if cuda else 2048)
    assert tokens("--run.device", "cpu", "--run.micro_tokens", "60") == 60


def test_what_was_chosen_is_written_down(tmp_path, monkeypatch):
    recipe = load_recipe(SFTRecipe, None, [*SFT, "--run.device", "cpu"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_recipe(SFTRecipe, tmp_path / "recipe.yaml") == recipe
