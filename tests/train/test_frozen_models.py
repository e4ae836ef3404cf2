"""Reference and reward model wait in the CPU's memory and are on the device in their own phase only (`offload`, of
DPO and KTO too), or lie on a second device (`frozen_apart`); what is learned stays the same, bit for bit. The devices
are the stand-ins of `pretend_device.py`, where a tensor of the CPU or of another device among others is an error, as
on CUDA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
from forked import Python
from ranks_kit import launch, trained_weights
from test_ranks_equal_one import recipe_of
from train_kit import merge, save_tiny
from transformers import AutoModelForCausalLM

from steersman.run.device import device_apart
from steersman.types import SteersmanError
from steersman.verb_table import VERBS
from steersman.verbs.feedback import RECIPES as FEEDBACK
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.preference import PreferenceRecipe

WEIGHTS = {"loss.desirable_weight": 1, "loss.undesirable_weight": 1}
WORKER = Path(__file__).with_name("frozen_worker.py")


def values_of(folder: Path, model: Path, run: str) -> dict[str, Any]:
    values = recipe_of("ppo-reward-model", folder, model, run, 1, {})["recipe"]
    del values["run"]["devices"]
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    save_tiny(folder / "model")
    return folder


def offline_values(verb: str, folder: Path, run: str) -> dict[str, Any]:
    """DPO's or KTO's recipe, which looks at held prompts."""
    values = recipe_of(verb, folder, folder / "model", run, 1, {})["recipe"]
    del values["run"]["devices"]
    return merge(values, {"model.dtype": "float32", "samples": {"prompts": 2, "max_new_tokens": 4}})


@pytest.fixture(scope="module")
def found(folder) -> list[dict[str, list[str]]]:
    """Where the models lay in a run that keeps them on its device, in one that takes them to the CPU, and in one that
    has them on another device; and DPO's and KTO's reference in runs that keep it, that take it to the CPU, and that
    look at no held prompts."""
    recipes = [
        ("ppo", merge(values_of(folder, folder / "model", run), {"run.device": "pretend", **more}))
        for run, more in (("stays", {}), ("waits", {"offload": True}), ("apart", {"frozen_apart": True}))
    ]
    recipes += [
        (verb, merge(offline_values(verb, folder, run), {"run.device": "pretend", **more}))
        for verb in ("dpo", "kto")
        for run, more in (("stays", {}), ("waits", {"offload": True}))
    ]
    unread: list[tuple[str, dict[str, Any]]] = [
        ("dpo", {}), ("kto", {}), ("dpo", {"data.cache": str(folder / "cache")})
    ]  # fmt: skip
    recipes += [
        (
            verb,
            merge(
                offline_values(verb, folder, f"unread-{i}"), {"run.device": "pretend", "samples.prompts": 0, **more}
            ),
        )
        for i, (verb, more) in enumerate(unread)
    ]
    (folder / "recipes.json").write_text(json.dumps(recipes))
    running = Python(str(WORKER), str(folder / "recipes.json"), str(folder / "found.json"))
    said = running.communicate(timeout=300)
    assert running.returncode == 0, said[1][-4000:]
    return json.loads((folder / "found.json").read_text())


needs_device = pytest.mark.skipif(not pretend_device.available(), reason="needs Linux and a C++ compiler")


@pytest.fixture
def places(found) -> list[dict[str, list[str]]]:
    return found[:3]


@needs_device
@pytest.mark.parametrize("at", [3, 5], ids=["dpo", "kto"])
def test_an_offline_reference_is_on_the_device_while_it_is_read(at, found):
    stays, waits = found[at : at + 2]
    assert stays == {phase: ["pretend:0"] for phase in ("reference", "distance", "update")}
    assert waits == stays | {"update": ["cpu"]}


@needs_device
@pytest.mark.parametrize(
    ("at", "during"), [(7, "cpu"), (8, "pretend:0"), (9, "pretend:0")], ids=["dpo", "kto", "dpo from a cache"]
)
def test_a_reference_that_is_never_read_again_leaves_the_device(at, during, found):
    """KTO reads it once an update, and of a cache it is read batch by batch."""
    assert found[at]["reference"] == ["pretend:0"]
    assert found[at]["update"] == [during]


@needs_device
@pytest.mark.parametrize("verb", ["dpo", "kto"])
def test_what_offline_methods_learn_is_the_same_bit_for_bit(verb, found, folder):
    stays, waits = (trained_weights(folder / run / verb) for run in ("stays", "waits"))
    assert stays.keys() == waits.keys()
    assert all(torch.equal(stays[key], waits[key]) for key in stays)


@pytest.mark.parametrize(
    ("verb", "changes", "words"),
    [
        ("dpo", {"parallel": {"mode": "zero3"}}, "zero3 they lie in pieces.*parallel.offload: true"),
        ("kto", {"model.lora": {"r": 2}}, "no reference of its own"),
        ("dpo", {"loss.name": "tdpo2"}, "read in every micro-batch"),
        ("dpo", {"data.cache": "cache"}, "read in every micro-batch"),
        ("dpo", {"loss.name": "simpo", "samples.prompts": 0}, "no reference of its own"),
        ("kto", {"data.stream": True, "data.held_out": 0, "train.max_steps": 2, **WEIGHTS}, "in every micro-batch"),
        ("dpo", {"model.quantise": "nf4", "model.lora": {"r": 2}, "reference": "x"}, "remove model.quantise"),
    ],
)  # fmt: skip
def test_an_offline_reference_that_can_not_wait_is_refused_by_name(verb, changes, words, folder):
    recipe = {"dpo": PreferenceRecipe, "kto": FEEDBACK["kto"]}[verb]
    values = merge(offline_values(verb, folder, "refused"), {"offload": True})
    recipe.model_validate(values)
    with pytest.raises(ValueError, match=words):
        recipe.model_validate(merge(values, changes))


@needs_device
def test_frozen_models_are_on_the_device_in_their_phase_only(places):
    stays, waits, apart = places
    assert stays == {phase: ["pretend:0 pretend:0"] for phase in waits}
    assert apart == {phase: ["pretend:1 pretend:1"] for phase in waits}
    # reference, then reward model
    assert waits == {
        "rollout": ["cpu cpu"], "reward": ["cpu pretend:0"], "reference": ["pretend:0 cpu"], "update": ["cpu cpu"],
    }  # fmt: skip


@needs_device
def test_what_is_learned_is_the_same_bit_for_bit(places, folder):
    name = "ppo-reward-model"
    stays, *others = (trained_weights(folder / run / name) for run in ("stays", "waits", "apart"))
    for other in others:
        assert stays.keys() == other.keys()
        assert all(torch.equal(stays[key], other[key]) for key in stays)


@pytest.mark.parametrize("verb", ["ppo", "dpo", "kto"])
def test_what_waits_in_half_precision_on_a_cpu_teaches_the_same(verb, tmp_path):
    """The models come from files in bfloat16 and are trained in float32."""
    model = save_tiny(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    ppo = verb == "ppo"
    cases = [recipe_of("ppo-reward-model" if ppo else verb, tmp_path, model, run, 1, {}) for run in ("a", "b")]
    for case, offload in zip(cases, (False, True), strict=True):
        del case["recipe"]["run"]["devices"]
        recipe = {**RECIPES, **FEEDBACK, "dpo": PreferenceRecipe}[verb]
        values = recipe.model_validate(merge(case["recipe"], {"model.dtype": "float32", "offload": offload}))
        VERBS[verb].here(values, resume=False)
    stays, waits = (trained_weights(Path(case["recipe"]["run"]["dir"])) for case in cases)
    assert stays.keys() == waits.keys()
    assert all(torch.equal(stays[key], waits[key]) for key in stays)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": {"mode": "fsdp"}}, "with parallel.offload: true"),
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offload": True}, "remove one of the two"),
        ({"share": "base", "model.lora": {"r": 2}}, "no frozen model has weights of its own"),
        ({"model.lora": {"r": 2}, "reward.parts": {"a": {"builtin": "vader_sentiment"}}}, "no reward model to move"),
    ],
)
def test_what_can_not_lie_apart_is_refused_by_name(changes, words, folder):
    values = merge(values_of(folder, folder / "model", "refused"), {"frozen_apart": True})
    with pytest.raises(ValueError, match=words):
        RECIPES["ppo"].model_validate(merge(values, changes))


def test_frozen_models_apart_are_whole_while_the_others_lie_in_pieces(folder):
    """Two ranks with FSDP2's pieces learn what one process learns; that there are devices apart is pretended."""
    # the judge scores in float32; with this eps AdamW does not magnify what that rounds in small gradients
    name, more = "ppo-reward-model", {"critic.init": "policy", "optimizer.eps": 1e-5}
    alone = recipe_of(name, folder, folder / "model", "alone", 1, {})
    apart = recipe_of(name, folder, folder / "model", "two-apart", 2, {"mode": "fsdp", "timeout": 60})
    for case, own in ((alone, {}), (apart, {"frozen_apart": True})):
        case["recipe"] = merge(case["recipe"], more | own)
    launch(folder / "alone.json", [alone], 1)
    launch(folder / "two-apart.json", [apart], 2, worker=Path(__file__).with_name("apart_worker.py"))
    wanted, found = (trained_weights(folder / run / name) for run in ("alone", "two-apart"))
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=key)


def test_a_machine_with_one_device_says_so():
    with pytest.raises(SteersmanError, match="the CPU is one device"):
        device_apart(torch.device("cpu"))


def test_a_launcher_that_does_not_count_the_ranks_of_a_machine_is_told_to(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(SteersmanError, match="let it set LOCAL_WORLD_SIZE"):
        device_apart(torch.device("cuda"))


@needs_device
def test_too_few_devices_for_the_ranks_are_counted(folder):
    script = """
import os, pretend_device, torch
from steersman.run.device import device_apart, resolve_device
pretend_device.start()
assert device_apart(resolve_device("pretend")) == torch.device("pretend:1")
os.environ["LOCAL_WORLD_SIZE"] = "2"
device_apart(torch.device("pretend:1"))
"""
    running = Python("-c", script)
    _, said = running.communicate(timeout=120)
    assert "2 ranks on this machine need 4 devices, from 0 on, and there are 2" in said
