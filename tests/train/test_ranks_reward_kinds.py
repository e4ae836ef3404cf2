"""Every kind of reward model is trained, mixed and evaluated by two ranks as by one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_kit import launch, trained_weights
from reward_kit import settings
from safetensors.torch import load_file
from train_kit import merge, rows, save_tiny

pytestmark = pytest.mark.slow
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "heads": ("preference", {"heads": 3}),
    "bottleneck": ("preference", {"bottleneck": 4}),
    "planes": ("preference", {"planes": 2}),
    "attributes": ("attributes", {}),
    "plain": ("preference", {}),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "replicas": (2, {}),
    "shards": (2, {"mode": "fsdp"}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    model = save_tiny(folder / "model")
    for layout, (world, parallel) in LAYOUTS.items():
        own = {"model.dtype": "float64", "run.devices": world, "parallel": {"timeout": 20, **parallel}}
        place = folder / layout
        recipes = {name: settings(folder, model, kind, f"{layout}/{name}", **train)
                   for name, (kind, train) in TRAINED.items()}  # fmt: skip
        recipes["gating"] = settings(folder, place / "attributes/model", "gating", f"{layout}/gating")
        for name in ("plain", "bottleneck", "gating"):
            trained = settings(folder, place / f"{name}/model", "preference", f"{layout}/{name}-evaluated")
            recipes[f"{name}-evaluated"] = merge(trained, {"stage": "evaluate"})
        cases = [{"verb": "reward", "recipe": merge(recipe, own)} for recipe in recipes.values()]
        launch(folder / f"{layout}.json", cases, world, timeout=200)
    return folder


@pytest.mark.parametrize("name", [*TRAINED, "gating"])
@pytest.mark.parametrize("layout", ["replicas", "shards"])
def test_it_learns_what_one_process_learns(layout, name, runs):
    found, wanted = (trained_weights(runs / where / name) for where in (layout, "alone"))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        close = 2e-6 if name == "gating" else 1e-9  # its network is of float32, whatever the model is
        torch.testing.assert_close(found[key], value, rtol=0, atol=close, msg=lambda text, key=key: f"{key}: {text}")
    norms = [[row["grad_norm"] for row in rows(runs / where / name)[1:]] for where in (layout, "alone")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("layout", ["replicas", "shards"])
def test_it_saves_what_one_process_saves(layout, runs):
    for name in ("bottleneck/model/decoder.safetensors", "gating/model/gating.safetensors"):
        found, wanted = (load_file(runs / where / name) for where in (layout, "alone"))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "bottleneck", "gating"])
@pytest.mark.parametrize("layout", ["replicas", "shards"])
def test_it_is_evaluated_as_by_one_process(layout, name, runs):
    found, wanted = (json.loads((runs / where / f"{name}-evaluated/summary.json").read_text())
                     for where in (layout, "alone"))  # fmt: skip
    numbers = {key: x for key, x in wanted.items() if isinstance(x, float) and key != "seconds"}
    assert len(numbers) > 3
    assert {key: found[key] for key in numbers} == pytest.approx(numbers, abs=1e-5)
