"""The verb on real small models: every form of it brings the student nearer, and a killed run goes on bit for bit."""

from __future__ import annotations

import pytest
import torch
from distill_kit import distil, stopped_and_resumed
from letter_models import LETTERS, letters, save_mini
from tiny_models import tiny_model
from train_kit import merge, rewards_file, rows, weights

from steersman.distill import run as verb
from steersman.distill.recipe import SOURCES, DistillRecipe
from steersman.ops.divergence import DIVERGENCES
from steersman.types import SteersmanError


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "skew_kl", "skew_reverse_kl", "minillm"])
def test_on_its_own_answers_a_student_nears_its_teacher(settings, name):
    told = distil(settings, loss__name=name, train__epochs=6)
    assert told["teacher_kl_after"] < 0.85 * told["teacher_kl_before"]


def test_every_loss_has_its_source():
    assert set(SOURCES) == {*DIVERGENCES, "minillm", "uld"}


def test_on_given_answers_too_and_their_likelihood_is_told(settings):
    told = distil(settings, train__on_policy=0, loss__name="forward_kl", data__held_out=2, train__epochs=8)
    assert told["teacher_kl_after"] < told["teacher_kl_before"]
    assert "loss_after" in told


def test_a_share_of_updates_is_on_own_answers(settings, tmp_path):
    distil(settings, train__on_policy=0.5, train__epochs=8, loss__nll=0.1)
    own = [row["on_policy"] for row in rows(tmp_path / "run") if "on_policy" in row]
    assert 0.2 < sum(own) / len(own) < 0.8


def test_likelihood_alone_is_fine_tuning(settings):
    """A skew of 1 compares a distribution with itself, so that only the likelihood is left."""
    told = distil(
        settings, train__on_policy=0, loss__name="skew_kl", loss__mix=1.0, loss__nll=1.0, data__held_out=2,
        train__epochs=10,
    )  # fmt: skip
    assert told["loss_after"] < told["loss_before"]


def test_a_column_that_the_reward_lacks_is_told_before_anything_is_sampled(settings, tmp_path):
    with pytest.raises(SteersmanError, match="needs the column 'answer', which the data does not have"):
        distil(settings, reward={"parts": {"right": {"builtin": "math_answer"}}})
    assert not (tmp_path / "run").exists()


def test_a_reward_is_added(settings, tmp_path):
    reward = {"parts": {"a": {"function": f"{rewards_file(tmp_path)}:count_a"}}}
    more = distil(
        settings, reward=reward, rollout__samples=4, train__epochs=12, loss__reward_weight=20.0, loss__name="minillm"
    )
    assert more["reward/total_after"] > more["reward/total_before"] + 0.2


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_model_that_knows_more_teaches_itself_without(settings, tmp_path, lora):
    """The context moves the teacher's distributions, and the student nears them without it. A live teacher begins as
    the same model, and then moves with the student."""
    told = {}
    for path in ("start", "live"):
        teacher = {"path": path, "prompt": "{hint}{hint}{hint} {prompt}"}
        run = {"run__dir": str(tmp_path / path), "train__epochs": 12, "optimizer__lr": 5e-3}
        told[path] = distil(settings, teacher=teacher, model__lora=lora, **run)
    assert told["start"]["teacher_kl_before"] > 0.01
    assert told["start"]["teacher_kl_after"] < told["start"]["teacher_kl_before"]
    assert told["live"]["teacher_kl_before"] == pytest.approx(told["start"]["teacher_kl_before"], rel=1e-5)
    assert told["live"]["teacher_kl_after"] != told["start"]["teacher_kl_after"]


def other_tokenizer(folder):
    """A teacher whose tokens are in another order and more: no id means the same."""
    vocabulary = [*LETTERS[:3], *reversed(LETTERS[3:]), "-", "0"]
    torch.manual_seed(5)
    model = tiny_model("llama", vocab=len(vocabulary), seed=3, scale=3.0)
    model.save_pretrained(folder)
    letters(vocabulary=vocabulary).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("share", [1, 0])
def test_a_teacher_with_another_tokenizer_is_read_through_text_or_refused(settings, tmp_path, share):
    teacher = {"path": str(other_tokenizer(tmp_path / "other"))}
    with pytest.raises(SteersmanError, match=r"use loss\.name uld"):
        distil(settings, teacher=teacher)
    told = distil(
        settings, teacher=teacher, loss__name="uld", train__epochs=8, run__dir=str(tmp_path / "uld"),
        train__on_policy=share, rollout__max_new_tokens=6,
    )  # fmt: skip
    assert told["uld_after"] < 0.9 * told["uld_before"]


def test_a_stopped_run_goes_on_bit_for_bit(settings, tmp_path, monkeypatch):
    extra = {"train.on_policy": 0.5, "rollout.samples": 2}
    whole = merge(settings, {**extra, "run.dir": str(tmp_path / "whole")})
    verb.run(DistillRecipe.model_validate(whole))
    cut = merge(settings, {**extra, "run.dir": str(tmp_path / "cut")})
    stopped_and_resumed(cut, 5, monkeypatch)
    first, second = (weights(tmp_path / name / "model") for name in ("whole", "cut"))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_micro_batches_change_nothing(settings, tmp_path):
    """One batch, whole or in parts: the same weights to rounding, in float64 steps of one update."""
    for name, size in (("a", 10_000), ("b", 20)):
        distil(settings, run__micro_tokens=size, run__dir=str(tmp_path / name), train__max_steps=1)
    first, second = (weights(tmp_path / name / "model") for name in ("a", "b"))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"teacher": {"path": "start"}}, "has nothing to learn from itself"),
        ({"teacher": {}}, "exactly one of path and endpoint"),
        ({"loss": {"name": "minillm"}, "train.on_policy": 0.5}, "in every update"),
        ({"loss": {"name": "minillm"}, "rollout.top_p": 0.9}, "sample without top_k"),
        ({"loss": {"name": "minillm"}, "rollout.temperature": 0.7}, "must be loss.temperature"),
        ({"loss": {"nll": 1.0}}, "gives none"),
        ({"loss": {"mix": 0.3}}, "reverse_kl mixes nothing"),
        ({"loss": {"normalised": False}}, "reverse_kl divides nothing"),
        ({"teacher": {"endpoint": {"url": "http://x", "model": "m"}}, "loss": {"temperature": 2.0}}, "temperature 1"),
        ({"teacher": {"endpoint": {"url": "http://x", "model": "m"}}, "loss": {"name": "uld"}}, "lists only top_k"),
        ({"model.scratch": {"model_type": "llama"}}, "nothing to say yet"),
    ],
)
def test_refused_before_anything_runs(settings, extra, said):
    values = merge(settings, {k: v for k, v in extra.items() if k != "teacher"})
    values["teacher"] = extra.get("teacher", values["teacher"])
    with pytest.raises(ValueError, match=said):
        DistillRecipe.model_validate(values)


@pytest.mark.parametrize(
    ("template", "said"),
    [("{answer} {prompt}", "names {answer}, and the row has"), ("{0.__class__}", "is no column name"),
     ("{prompt", "plain braces"), ("{prompt:d}", r"line 1, field 'prompt': teacher\.prompt.*can not have"),
     ("{prompt!x}", "conversion 'x'")],
)  # fmt: skip
def test_a_template_of_the_teacher_is_checked(settings, template, said):
    with pytest.raises(SteersmanError, match=said):
        distil(settings, teacher__prompt=template)


def test_a_context_without_room_is_refused_by_row(settings, tmp_path):
    short = save_mini(tmp_path / "short", 2, context=12)
    with pytest.raises(SteersmanError, match=r"rows.jsonl, line \d+.*exceeds its context of 12"):
        distil(settings, teacher__path=str(short))
