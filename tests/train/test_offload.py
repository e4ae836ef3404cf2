"""Reference and reward model wait in the CPU's memory and are on the device in their own phase only; what is learned
stays the same, bit for bit. The device is the stand-in of `pretend_device.py`, where a tensor of the CPU among others
is an error, as on CUDA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
from forked import Python
from ranks_kit import trained_weights
from test_ranks_equal_one import recipe_of
from train_kit import merge, save_tiny

from steersman.verbs.on_policy_recipes import RECIPES

WORKER = Path(__file__).with_name("offload_worker.py")


def values_of(folder: Path, model: Path, run: str) -> dict[str, Any]:
    values = recipe_of("ppo-reward-model", folder, model, run, 1, {})["recipe"]
    del values["run"]["devices"]
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    save_tiny(folder / "model")
    return folder


@pytest.fixture(scope="module")
def places(folder) -> list[dict[str, list[str]]]:
    """Where the models lay in a run that keeps them on the device, and in one that does not."""
    stays, waits = (
        merge(values_of(folder, folder / "model", run), {"run.device": "pretend", "offload": run == "waits"})
        for run in ("stays", "waits")
    )
    (folder / "recipes.json").write_text(json.dumps([stays, waits]))
    running = Python(str(WORKER), str(folder / "recipes.json"), str(folder / "found.json"))
    said = running.communicate(timeout=300)
    assert running.returncode == 0, said[1][-4000:]
    return json.loads((folder / "found.json").read_text())


needs_device = pytest.mark.skipif(not pretend_device.available(), reason="needs Linux and a C++ compiler")


@needs_device
def test_frozen_models_are_on_the_device_in_their_phase_only(places):
    stays, waits = places
    assert stays == {phase: ["pretend pretend"] for phase in waits}
    # reference, then reward model
    assert waits == {
        "rollout": ["cpu cpu"], "reward": ["cpu pretend"], "reference": ["pretend cpu"], "update": ["cpu cpu"],
    }  # fmt: skip


@needs_device
def test_what_is_learned_is_the_same_bit_for_bit(places, folder):
    name = "ppo-reward-model"
    stays, waits = trained_weights(folder / "stays" / name), trained_weights(folder / "waits" / name)
    assert stays.keys() == waits.keys()
    assert all(torch.equal(stays[key], waits[key]) for key in stays)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": {"mode": "fsdp"}}, "give parallel.offload: true"),
        ({"share": "base", "model.lora": {"r": 2}}, "no frozen model has weights of its own"),
        ({"model.quantise": "nf4", "model.lora": {"r": 2}}, "remove model.quantise"),
        ({"rollout.engine": "process", "rollout.ahead": 1}, "rollout.ahead: 0"),
        ({"model.lora": {"r": 2}, "reward.parts": {"a": {"builtin": "vader_sentiment"}}}, "no reward model to move"),
    ],
)
def test_what_can_not_wait_is_refused_by_name(changes, words, folder):
    values = merge(values_of(folder, folder / "model", "refused"), {"offload": True})
    with pytest.raises(ValueError, match=words):
        RECIPES["ppo"].model_validate(merge(values, changes))
