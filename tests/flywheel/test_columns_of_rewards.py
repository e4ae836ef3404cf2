"""A column that a reward needs and the data lack is told before anything is sampled, and the folder stays free."""

from __future__ import annotations

import pytest
from letter_models import WORDS, write_jsonl
from train_kit import settings
from wheel_kit import loop_settings

from steersman.flywheel import best_of_n, steps
from steersman.flywheel.players import Player
from steersman.types import SteersmanError
from steersman.verbs import rl
from steersman.verbs.on_policy_recipes import RECIPES

MATHS = {"right": {"builtin": "math_answer"}}
MISSING = r"reward 'right': the function needs the column 'answer', which the data does not have; it has: prompt"


def test_of_step_labels(tmp_path, mini_model):
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": word} for word in WORDS])
    asked = {
        "model": {"path": str(mini_model)},
        "data": {"path": str(data)},
        "reward": MATHS,
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
    }
    with pytest.raises(SteersmanError, match=MISSING):
        steps.run(steps.StepLabelsRecipe.model_validate(asked))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (MATHS, MISSING),
        ({"right": {"metric": "rougeL"}}, "the metric rougeL needs references, and the data have no column"),
    ],
)
def test_of_a_verb_that_learns_from_its_samples(tmp_path, mini_model, part, message):
    asked = settings(tmp_path, mini_model) | {"reward": {"parts": part}}
    with pytest.raises(SteersmanError, match=message):
        rl.run(RECIPES["grpo"].model_validate(asked))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"judge": {"reward": MATHS}}, {"watch": MATHS}])
def test_of_a_loop(tmp_path, mini_model, changes, monkeypatch):
    monkeypatch.setattr(Player, "engine", lambda *_: pytest.fail("something was sampled"))
    asked = loop_settings(tmp_path, mini_model, "run", **changes)
    with pytest.raises(SteersmanError, match=MISSING):
        best_of_n.run(best_of_n.BestOfNRecipe.model_validate(asked))
    assert not (tmp_path / "run").exists()
