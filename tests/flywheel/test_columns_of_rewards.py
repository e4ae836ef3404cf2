"""A column that a reward or a metric needs, and a value that one row lacks there, is told before anything is sampled,
and the folder stays free."""

from __future__ import annotations

import pytest
from letter_models import WORDS, write_jsonl
from train_kit import settings
from wheel_kit import loop_settings

from steersman.cli import main
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


OWN = """
def right(prompts, completions, gold, hint=None, **columns):
    assert None not in gold
    return [float(str(g) in text) for g, text in zip(gold, completions)]

def swapped(texts, gold, **columns):
    return [0.0 for _ in texts]
"""
EMPTY = "the reference is an empty list"


def holed(folder, at, value=None):
    """12 rows with a column `gold`, which row `at` (from 1) has not, or as `value`."""
    rows = [{"prompt": word, "gold": str(i), "hint": None} for i, word in enumerate(WORDS)]
    rows[at - 1] |= {"gold": value}
    if value is None:
        del rows[at - 1]["gold"]
    (folder / "own.py").write_text(OWN)
    return write_jsonl(folder / "holed.jsonl", rows)


@pytest.mark.parametrize(
    ("part", "value", "wrong"),
    [
        ({"function": "own.py:right"}, None, "reward 'r' needs it of every row, and here it is missing"),
        ({"builtin": "math_answer", "columns": {"answer": "gold"}}, None, "reward 'r' needs it .* it is missing"),
        ({"metric": "exact_match", "columns": {"references": "gold"}}, None, "the reference is missing"),
        ({"metric": "rougeL", "columns": {"references": "gold"}}, [], EMPTY),
        ({"metric": "rougeL", "columns": {"references": "gold"}}, ["a", " "], "a reference is empty"),
    ],
)
@pytest.mark.parametrize("at", [2, 12])
def test_a_hole_in_one_row_is_a_bad_row_before_the_run(tmp_path, mini_model, part, value, wrong, at):
    data = holed(tmp_path, at, value)
    if "function" in part:
        part = {"function": f"{tmp_path}/{part['function']}"}
    asked = settings(tmp_path, mini_model) | {"data": {"path": str(data)}, "reward": {"parts": {"r": part}}}
    where = rf"holed\.jsonl, line {at}, field 'gold': .*{wrong}.*data\.on_bad_row: skip"
    with pytest.raises(SteersmanError, match=where):
        rl.run(RECIPES["grpo"].model_validate(asked))
    assert not (tmp_path / "run").exists()


def test_such_rows_are_left_out_where_the_recipe_says_so(tmp_path, mini_model, capsys):
    data = holed(tmp_path, 4)
    part = {"function": f"{tmp_path}/own.py:right"}
    asked = settings(tmp_path, mini_model) | {
        "data": {"path": str(data), "on_bad_row": "skip"}, "reward": {"parts": {"r": part}}, "iterations": 6,
    }  # fmt: skip
    rl.run(RECIPES["grpo"].model_validate(asked))
    told = " ".join(capsys.readouterr().out.split())
    assert "11 prompts" in told
    assert "1 rows left out: 1 missing field" in told


@pytest.mark.parametrize("place", ["judge", "watch"])
def test_a_hole_of_a_loop_or_of_step_labels(tmp_path, mini_model, monkeypatch, place):
    monkeypatch.setattr(Player, "engine", lambda *_: pytest.fail("something was sampled"))
    data, part = holed(tmp_path, 11), {"r": {"function": f"{tmp_path}/own.py:right"}}
    changes = {"judge": {"reward": part}} if place == "judge" else {"watch": part}
    asked = loop_settings(tmp_path, mini_model, "run", **changes) | {"data": {"path": str(data)}}
    with pytest.raises(SteersmanError, match=r"holed\.jsonl, line 11, field 'gold': reward 'r' needs it"):
        best_of_n.run(best_of_n.BestOfNRecipe.model_validate(asked))
    labels = {key: asked[key] for key in ("model", "data")} | {"reward": part, "run": {"dir": str(tmp_path / "run")}}
    with pytest.raises(SteersmanError, match=r"holed\.jsonl, line 11, field 'gold': reward 'r' needs it"):
        steps.run(steps.StepLabelsRecipe.model_validate(labels))


@pytest.mark.parametrize("of", ["file", "generate", "training"])
def test_a_hole_of_a_metric(tmp_path, mini_model, of, capsys):
    data = holed(tmp_path, 3)
    rouge = "{rougeL: {columns: {references: gold}}}"
    if of == "training":
        asked = settings(tmp_path, mini_model) | {
            "evaluation": {
                "data": {"path": str(data)}, "metrics": {"rougeL": {"columns": {"references": "gold"}}},
            }
        }  # fmt: skip
        with pytest.raises(
            SteersmanError, match=r"holed\.jsonl, line 3, field 'gold': 'rougeL' .*missing.*evaluation\.data"
        ):
            rl.run(RECIPES["grpo"].model_validate(asked))
        assert not (tmp_path / "run").exists()
        return
    words = ["--file", str(data), "--completion", "prompt"]
    if of == "generate":
        words = ["--generate.model.path", str(mini_model), "--generate.data.path", str(data)]
    assert main(["evaluate", *words, "--metrics", rouge]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "holed.jsonl, line 3, field 'gold': 'rougeL' (metric rougeL) needs it of every row" in told
    assert ("generate.data.on_bad_row: skip" in told) == (of == "generate")


def test_columns_that_are_given_by_position_are_told(tmp_path, mini_model):
    holed(tmp_path, 3, "x")
    part = {"r": {"function": f"{tmp_path}/own.py:swapped"}}
    asked = settings(tmp_path, mini_model) | {
        "data": {"path": str(tmp_path / "holed.jsonl")}, "reward": {"parts": part},
    }  # fmt: skip
    with pytest.raises(
        SteersmanError, match="first two parameters, texts and gold, get the prompts and the completions"
    ):
        rl.run(RECIPES["grpo"].model_validate(asked))
