"""Metrics of answers and tasks of lm-evaluation-harness are measured at every look, by every verb that trains a
policy; what can not be measured ends a run before it begins."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest
from evaluation_kit import evaluation
from letter_models import rows_of
from test_ranks_equal_one import recipe_of
from train_kit import merge

from steersman.metrics import metric
from steersman.run.preflight import Preflight
from steersman.types import SteersmanError
from steersman.verb_table import VERBS

pytest.importorskip("lm_eval")

KEYS = {f"evaluation/{name}" for name in ("chrf", "letters", "letters/acc", "letters/acc_stderr")}


def made(name: str, folder: Path, model: Path, changes: dict[str, Any] | None = None) -> Any:
    case = recipe_of("sft" if name == "distill" else name, folder, model, "run", 1, {})
    del case["recipe"]["run"]["devices"]
    values = merge(case["recipe"], {"evaluation": evaluation(folder), **(changes or {})})
    if name == "distill":
        values |= {"teacher": {"path": str(model)}, "rollout": {"max_new_tokens": 6}}
    verb = VERBS[name if name == "distill" else case["verb"]]
    return verb, verb.recipe_class(None, []).model_validate(values)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "grpo"])
def test_every_look_measures(name, tmp_path, mini):
    verb, recipe = made(name, tmp_path, mini)
    summary = verb.here(recipe, resume=False)
    rows = [row for row in rows_of(Path(recipe.run.dir) / "metrics.jsonl") if KEYS & row.keys()]
    steps = [row["step"] for row in rows]
    last = summary["steps"]
    assert steps == sorted({0, last, *range(2, last + 1, 2)})
    assert all(row.keys() >= KEYS for row in rows)
    assert {key: summary[key] for key in KEYS} == {key: rows[-1][key] for key in KEYS}
    answers = rows_of(Path(recipe.run.dir) / "evaluation.jsonl")
    assert [row["step"] for row in answers] == [step for step in steps for _ in range(12)]
    of_start = [row["completion"] for row in answers[:12]]
    assert rows[0]["evaluation/letters"] == metric("length").corpus(of_start).value
    assert of_start != [row["completion"] for row in answers[-12:]]


def test_a_resumed_run_goes_on_with_the_same_looks(tmp_path, mini):
    verb, recipe = made("sft", tmp_path, mini, {"train.max_steps": 4, "train.epochs": 9.0})
    verb.here(recipe, resume=False)
    folder = Path(recipe.run.dir)
    verb, longer = made("sft", tmp_path, mini, {"train.max_steps": 6, "train.epochs": 9.0})
    verb.here(longer, resume=True)
    answers = rows_of(folder / "evaluation.jsonl")
    assert [row["step"] for row in answers] == [step for step in (0, 2, 4, 6) for _ in range(12)]


def test_the_best_weights_are_measured_again(tmp_path, mini):
    changes = {"train.keep": "best", "optimizer.lr": 0.5, "train.max_steps": 4, "run.save_every": 1}
    verb, recipe = made("sft", tmp_path, mini, changes)
    summary = verb.here(recipe, resume=False)
    rows = [row for row in rows_of(Path(recipe.run.dir) / "metrics.jsonl") if KEYS & row.keys()]
    best = min(rows, key=lambda row: row["held_out/loss"])
    assert best["step"] < 4
    assert summary["evaluation/chrf"] == pytest.approx(best["evaluation/chrf"])
    assert summary["evaluation/chrf"] != rows[-1]["evaluation/chrf"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation.metrics": {"chrf": {}}}, "evaluation.metrics: 'chrf': .* no column 'references'"),
        ({"evaluation.metrics": {"nosuch": {}}}, "nosuch"),
        ({"evaluation.harness.tasks": ["nosuch"]}, "evaluation.harness.tasks: there is no task nosuch"),
        ({"evaluation.data.path": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_can_not_be_measured_ends_the_run_before_it_begins(changes, words, tmp_path, mini):
    verb, recipe = made("sft", tmp_path, mini, changes)
    with pytest.raises(SteersmanError, match=words):
        verb.here(recipe, resume=False)
    assert not (Path(recipe.run.dir) / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["sft", "grpo", "distill"])
def test_what_a_look_samples_counts_in_the_forecast_of_memory(name, tmp_path, mini, monkeypatch):
    caches = []

    def told(preflight: Preflight) -> None:
        caches.extend(phase.shares["cache"] for phase in preflight.phases if phase.name == "rollout")
        raise KeyboardInterrupt

    monkeypatch.setattr(Preflight, "check", told)
    for longest in (6, 48):
        verb, recipe = made(name, tmp_path, mini, {"evaluation.max_new_tokens": longest})
        with pytest.raises(KeyboardInterrupt):
            verb.here(recipe, resume=False)
    assert caches[1] > 1.5 * caches[0]


@pytest.mark.parametrize("left", ["data", "metrics"])
def test_answers_and_metrics_come_together(left, tmp_path, mini):
    given = {k: v for k, v in evaluation(tmp_path).items() if k != left}
    with pytest.raises(ValueError, match=f"needs evaluation.{left}"):
        made("sft", tmp_path, mini, {"evaluation": given})


def test_a_list_of_names_is_enough(tmp_path, mini):
    _, recipe = made("sft", tmp_path, mini, {"evaluation.metrics": "[length, distinct]"})
    assert set(recipe.evaluation.metrics) == {"length", "distinct"}


def test_the_report_and_the_card_show_it(tmp_path, mini, with_report):
    verb, recipe = made("sft", tmp_path, mini, {"train.max_steps": 1})
    verb.here(recipe, resume=False)
    folder = Path(recipe.run.dir)
    page = (folder / "report.html").read_text()
    answers = rows_of(folder / "evaluation.jsonl")
    assert "Evaluation" in page
    assert all(row["completion"].strip() in html.unescape(page) for row in answers)
    assert "evaluation/letters/acc" in (folder / "model/README.md").read_text()
