"""The names that `import steersman` offers, used as a reader of the README would."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import steersman
from steersman.assets import story_model
from steersman.types import SteersmanError


def test_every_public_name_can_be_imported():
    for name in steersman.__all__:
        assert getattr(steersman, name) is not None
    assert set(steersman.__all__) <= set(dir(steersman))


def test_the_package_and_its_module_say_the_version_of_the_command():
    said = [
        subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=True).stdout
        for words in (["steersman", "--version"], ["steersman", "--help"])
    ]
    assert said[0].strip() == f"steersman {steersman.__version__}"
    assert "usage" in said[1].lower()


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'load_recipes'"):
        steersman.load_recipes  # noqa: B018


def test_import_alone_brings_no_heavy_library():
    code = "import sys, steersman; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_settings_arrive_as_they_were_given(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {path: some/model}\ndata: {path: a.jsonl}\noptimizer: {lr: 1e-3}\n")
    settings = {"optimizer.lr": 3e-7, "data.path": ["b.jsonl", "c d.jsonl"], "model.merge": False, "run.dir": "1e-5"}
    recipe = steersman.load_recipe("sft", file, settings)
    assert recipe.optimizer.lr == 3e-7
    assert recipe.data.path == ["b.jsonl", "c d.jsonl"]
    assert recipe.model.merge is False
    assert recipe.run.dir == "1e-5"
    assert recipe.model.path == "some/model"


def test_paths_and_numpy_values_are_what_they_stand_for(tmp_path):
    settings = {
        "model.path": tmp_path / "model", "data.path": [tmp_path / "a.jsonl", "b.jsonl"],
        "train.max_steps": np.int64(3), "optimizer.lr": np.float32(0.5), "model.merge": np.bool_(False),
        "data.scores": np.array(["a", "b"]),
    }  # fmt: skip
    recipe = steersman.load_recipe("reward", None, settings)
    assert recipe.model.path == str(tmp_path / "model")
    assert recipe.data.path == [str(tmp_path / "a.jsonl"), "b.jsonl"]
    assert (recipe.train.max_steps, recipe.optimizer.lr, recipe.model.merge) == (3, 0.5, False)
    assert recipe.data.scores == ["a", "b"]


class Round:
    def __repr__(self):
        return "a round one"


ITSELF: list = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize("value", [len, Round(), {"a": {1}}, {(1, 2): 3}, ITSELF, b"x"])
def test_what_no_recipe_can_hold_is_refused_by_its_key(value):
    with pytest.raises(SteersmanError, match=r"settings: reward.parts: .*\. Give text, numbers"):
        steersman.load_recipe("grpo", None, {"reward.parts": value})


def test_a_recipe_of_another_verb_is_refused_by_both_names():
    words = {"model.path": "m", "data.path": "d"}
    grpo = steersman.load_recipe("grpo", None, {**words, "reward.parts": {"l": {"builtin": "length"}}})
    with pytest.raises(SteersmanError, match="sft: it was given a recipe of grpo; make its own with load_recipe"):
        steersman.run_verb("sft", grpo)
    with pytest.raises(SteersmanError, match="kto: it was given a recipe of sft"):
        steersman.run_verb("kto", steersman.load_recipe("sft", None, words))
    with pytest.raises(SteersmanError, match="control: it was given a recipe of grpo"):
        steersman.run_verb("control", grpo)
    with pytest.raises(SteersmanError, match="grpo: it was given a recipe of control"):
        steersman.run_verb("grpo", steersman.load_recipe("control"))
    with pytest.raises(SteersmanError, match="sft: it was given a dict"):
        steersman.run_verb("sft", {})


def test_a_wrong_verb_and_a_wrong_key_are_named():
    with pytest.raises(SteersmanError, match="ppoo: there is no such verb; did you mean ppo"):
        steersman.load_recipe("ppoo")
    with pytest.raises(SteersmanError, match="learnin_rate"):
        steersman.load_recipe("sft", None, {"model.path": "m", "data.path": "d", "optimizer.learnin_rate": 1})
    with pytest.raises(SteersmanError, match="there is no such verb"):
        steersman.run_verb("x", steersman.load_recipe("verify"))
    with pytest.raises(SteersmanError, match="verify keeps none"):
        steersman.run_verb("verify", steersman.load_recipe("verify"), resume=True)


@pytest.mark.slow
def test_a_run_from_python_is_the_verbs_run(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"The sun was warm {i}."}) + "\n" for i in range(8))
    )
    settings = {
        "model.path": str(story_model()), "data.path": str(tmp_path / "rows.jsonl"), "train.epochs": 1,
        "run.dir": str(tmp_path / "run"), "run.eval_every": 100,
    }  # fmt: skip
    summary = steersman.run_verb("sft", steersman.load_recipe("sft", None, settings))
    assert summary["finished"] is not False
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(json.dumps(summary))
