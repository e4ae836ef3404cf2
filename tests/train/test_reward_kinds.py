"""`steersman reward` by the shape of the data: it runs, resumes bit for bit, and what it leaves is loaded back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from letter_models import write_jsonl
from reward_kit import settings, word
from train_kit import merge, plain, recipe, rows, weights

from steersman.model import AttributeModel, GatedModel, load_reward, load_scalar
from steersman.train import offline
from steersman.types import SteersmanError, Tokens
from steersman.verbs import reward_model, rl

KINDS = ["preference", "ranking", "rating", "attributes", "feedback", "steps"]


def run(asked, *, resume=False):
    return reward_model.run(reward_model.RewardModelRecipe.model_validate(asked), resume=resume)


def interrupted(asked, monkeypatch, after: int):
    """The run, ended in the middle of a step as Ctrl-C would, and resumed."""
    left, step = [after], offline.Offline.step

    def stops(self, batch):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(offline.Offline, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            run(asked)
    return run(asked, resume=True)


def compare(whole, cut):
    for a, b in zip(rows(whole), rows(cut), strict=True):
        assert plain(a) == plain(b)
    a, b = weights(whole / "model"), weights(cut / "model")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    for name in ("config.json",):
        assert (whole / "model" / name).read_text() == (cut / "model" / name).read_text()
    assert (whole / "evaluation.json").read_text() == (cut / "evaluation.json").read_text()


@pytest.mark.parametrize("kind", [*KINDS, "plackett_luce"])
def test_each_kind_runs_and_resumes_bit_for_bit(kind, tmp_path, mini, monkeypatch, capsys):
    extra = {"loss": "plackett_luce", "centre": 0.01} if kind == "plackett_luce" else {}
    kind = "ranking" if kind == "plackett_luce" else kind
    asked = settings(tmp_path, mini, kind, **extra)
    summary = run(asked)
    assert summary["kind"] == ("rating" if kind == "attributes" else kind)
    assert "recognised" in capsys.readouterr().out
    interrupted(merge(asked, {"run.dir": str(tmp_path / "cut")}), monkeypatch, after=9)
    compare(tmp_path / "run", tmp_path / "cut")
    first, last = (row["loss"] for row in (rows(tmp_path / "run")[1], rows(tmp_path / "run")[-1]))
    assert math.isfinite(last)
    assert last < first or kind in ("preference", "ranking", "steps")  # whose labels here are noise


@pytest.fixture(scope="module")
def attributes(tmp_path_factory, mini):
    """A trained model of two attributes."""
    folder = tmp_path_factory.mktemp("attributes")
    asked = settings(folder, mini, "attributes")
    asked["train"]["epochs"] = 6
    run(asked)
    return folder / "run" / "model"


def test_gating_runs_resumes_and_loads_back(attributes, tmp_path, monkeypatch):
    asked = settings(tmp_path, attributes, "gating")
    summary = run(asked)
    assert summary["kind"] == "gating"
    assert {"held_out/accuracy/a alone", "held_out/accuracy/e alone"} <= summary.keys()
    interrupted(merge(asked, {"run.dir": str(tmp_path / "cut")}), monkeypatch, after=9)
    compare(tmp_path / "run", tmp_path / "cut")
    one, two = (load_reward(tmp_path / f / "model", device="cpu") for f in ("run", "cut"))
    assert isinstance(one, GatedModel)
    before, after = weights(attributes), weights(tmp_path / "run" / "model")
    assert all(torch.equal(before[k], after[k]) for k in before)  # trunk and heads stay
    tokens = Tokens.from_ids([[1, 5, 6]] * 2 + [[1, 9]], [[7, 8, 2], [9, 2], [3, 3, 3, 3, 2]])
    assert torch.equal(one.score(tokens), two.score(tokens))
    assert one.gating.penalty.any()
    again = run(
        merge(
            asked,
            {"stage": "evaluate", "model.path": str(tmp_path / "run" / "model"), "run.dir": str(tmp_path / "e")},
        )
    )
    assert again["held_out/accuracy"] == pytest.approx(summary["held_out/accuracy"])
    assert again["held_out/loss"] == pytest.approx(summary["held_out/loss"], abs=1e-5)


def test_gating_needs_attributes(tmp_path, mini):
    with pytest.raises(SteersmanError, match=r"model.path: .* is no reward model of several attributes"):
        run(settings(tmp_path, mini, "gating"))


def test_a_regression_speaks_in_the_datas_units(tmp_path, mini, attributes):
    asked = merge(settings(tmp_path, mini, "rating"), {"train.epochs": 12})
    summary = run(asked)
    assert summary["held_out/score/rmse"] < summary["held_out/baseline/score/rmse_of_the_mean"] * 1.2
    model = load_scalar(tmp_path / "run" / "model", device="cpu")
    assert model.meaning.attributes == ("score",)
    tokens = Tokens.from_ids([[1, 5]] * 2, [[7, 8, 2], [9, 2]])
    hidden = model.model(input_ids=torch.tensor([[1, 5, 9, 2]])).logits[0, 0]
    (shift,), (scale,) = model.meaning.shift, model.meaning.scale
    assert shift == pytest.approx(11.7, abs=0.1)
    assert float(model.score(tokens)[1].detach()) == pytest.approx(float(hidden.detach()) * scale + shift, abs=1e-4)
    assert torch.equal(model.value(tokens)[1, 2], model.score(tokens)[1])
    several = load_reward(attributes, device="cpu")
    assert isinstance(several, AttributeModel)
    said = several.attributes(tokens)
    assert (said[:, 1] > 90).all()
    assert (said[:, 0] < 10).all()
    critic = load_scalar(attributes, device="cpu")  # the trunk of several attributes, a new head
    assert not critic.value(tokens).any()
    with pytest.raises(SteersmanError, match=r"a reward model of a, e, but the data rates e, a"):
        load_reward(attributes, attributes=("e", "a"))


def test_evaluation_alone_says_what_training_said(tmp_path, mini):
    asked = merge(settings(tmp_path, mini, "feedback"), {"evaluation.subset": "source"})
    summary = run(asked)
    only = {"stage": "evaluate", "model.path": str(tmp_path / "run" / "model"), "run.dir": str(tmp_path / "e")}
    again = run(merge(asked, only))
    for key in ("held_out/auc", "held_out/loss", "held_out/accuracy", "held_out/calibration_error"):
        assert again[key] == pytest.approx(summary[key], abs=1e-5)
    report = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert set(report["subsets"]) == {"x", "y"}
    assert sum(s["n"] for s in report["subsets"].values()) == report["numbers"]["accuracy"]["n"]
    assert (tmp_path / "e" / "calibration.png").stat().st_size > 5000
    assert not (tmp_path / "e" / "model").exists()
    with pytest.raises(SteersmanError, match="all zeros, so there is no reward model to evaluate"):
        run(merge(asked, only | {"model.path": str(mini), "run.dir": str(tmp_path / "f")}))


def test_raters_are_the_ceiling(tmp_path, mini):
    report = run(settings(tmp_path, mini, "preference"))
    held = [v for v in report if v.startswith("held_out/raters/")]
    assert {v.rsplit("/", 1)[1] for v in held} == {"ceiling", "two_raters", "one_against_the_rest"}


@pytest.mark.parametrize(("kind", "change", "message"), [
    ("rating", {"train.loss": "plackett_luce"}, r"train.loss is plackett_luce, but the data is of kind rating"),
    ("feedback", {"kind": "ranking"}, r"these rows are thumbs up and down.*can not serve as rankings"),
    ("gating", {"kind": "rating"}, r"kind: rating, but the gating stage learns from preferences"),
    ("ranking", {"data.ties": "stop"}, r"ranking.jsonl, line 2: the answers are tied"),
    ("attributes", {"data.scores": ["a", "x"]}, r"attributes.jsonl: no training row rates 'x'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(kind, change, message, tmp_path, mini):
    with pytest.raises(SteersmanError, match=message):
        run(merge(settings(tmp_path, mini, kind), change))


def test_an_unknown_verbosity_is_refused(attributes, tmp_path):
    with pytest.raises(SteersmanError, match=r"gating.verbosity: 'chatty' is no attribute"):
        run(merge(settings(tmp_path, attributes, "gating"), {"gating.verbosity": "chatty"}))


def test_steps_that_the_tokens_do_not_end(tmp_path, mini):
    asked = settings(tmp_path, mini, "steps")
    write_jsonl(
        tmp_path / "steps.jsonl", [{"prompt": "q", "steps": ["go on", "ok " + "a" * 60], "labels": [1, 0]}] * 9
    )
    with pytest.raises(SteersmanError, match=r"line 1, field 'labels': 2 labels, but its tokens end 1 steps"):
        run(merge(asked, {"data.on_too_long": "truncate", "data.max_length": 6, "data.held_out": 0}))


def test_rankings_can_be_forced_to_be_pairs(tmp_path, mini, capsys):
    summary = run(merge(settings(tmp_path, mini, "ranking"), {"kind": "preference"}))
    assert summary["kind"] == "preference"
    assert "all pairs of unequal rank" in " ".join(capsys.readouterr().out.split())
    assert math.isfinite(summary["held_out/accuracy"])
    assert word(3) == "ok"


def test_models_of_steps_and_of_attributes_drive_ppo(base, attributes, tmp_path, mini):
    """As rewards, and as what its critic begins from."""
    trained = merge(settings(tmp_path, mini, "steps", "steps"), {"data.step_separator": "a"})
    words = [{"prompt": "q" + "?" * (i % 4), "steps": ["b", "c d"], "labels": [1, i % 2]} for i in range(20)]
    trained["data"] |= {"path": str(write_jsonl(tmp_path / "by-a.jsonl", words)), "held_out": 0}
    run(trained)
    parts = {
        "steps": {"model": str(tmp_path / "steps" / "model"), "steps": "sum"},
        "taste": {"model": str(attributes)},
    }
    asked = merge(base, {"reward.parts": parts, "iterations": 2, "run.dir": str(tmp_path / "ppo")})
    summary = rl.run(recipe("ppo", asked))
    assert summary["finished"]
    last = rows(tmp_path / "ppo")[-1]
    assert 0 < last["reward/steps"] < 9
    assert last["reward/total"] == pytest.approx(last["reward/steps"] + last["reward/taste"], abs=1e-4)
