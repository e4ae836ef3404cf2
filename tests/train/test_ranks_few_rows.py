"""Ranks that get nothing to do, since there are fewer prompts or rows than ranks, keep in step with the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from letter_models import write_jsonl
from ranks_kit import launch, trained_weights
from train_kit import merge, save_tiny, settings

pytestmark = pytest.mark.slow
ONE_PROMPT = {"rollout.prompts": 1, "rollout.samples": 2, "rollout.held_out": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {**ONE_PROMPT, "iterations": 3}),
    "ppo": ("ppo", ONE_PROMPT),
    "sft": ("sft", {}),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "replicas": (3, {}),
    "shards": (3, {"mode": "fsdp"}),
}


def recipe(verb: str, folder: Path, model: Path) -> dict[str, Any]:
    if verb != "sft":
        return settings(folder, model)
    rows = [{"prompt": "ask" + "?" * (i % 4), "completion": "ok" * (i % 3 + 1)} for i in range(8)]
    one = write_jsonl(folder / "asked.jsonl", [{"prompt": "the cat"}])
    return {
        "model": {"path": str(model)},
        "data": {"path": str(write_jsonl(folder / "rows.jsonl", rows)), "held_out": 1},
        "train": {"batch_size": 2, "max_steps": 2},
        "evaluation": {"data": {"path": str(one)}, "max_new_tokens": 6, "metrics": {"letters": {"metric": "length"}}},
        "run": {"threads": 1, "eval_every": 1},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    model = save_tiny(folder / "model")
    for layout, (world, parallel) in LAYOUTS.items():
        cases = []
        for name, (verb, extra) in CASES.items():
            own = {"model.dtype": "float64", "run.dir": str(folder / layout / name), "run.save_every": 9,
                   "run.devices": world, "parallel": {"timeout": 20, **parallel}}  # fmt: skip
            cases.append({"verb": verb, "recipe": merge(recipe(verb, folder, model), {**own, **extra})})
        launch(folder / f"{layout}.json", cases, world, timeout=200)
    return folder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["replicas", "shards"])
def test_they_learn_what_one_process_learns(layout, name, runs):
    found, wanted = (trained_weights(runs / where / name) for where in (layout, "alone"))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
