"""`steersman verify`: what it prints, writes and refuses; and a new method in one class and one line."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from steersman.advantage.gae import Advantage
from steersman.advantage.returns import return_to_go
from steersman.algorithms import ALGORITHMS, Algorithm, Coefficients
from steersman.cli import main
from steersman.config.load import load_recipe
from steersman.loss.correction import Correction
from steersman.loss.policy import reinforce
from steersman.types import SteersmanError, Trajectory
from steersman.verify.identities import identities
from steersman.verify.judge import Method, failures
from steersman.verify.run import VerifyRecipe, run


class Toy(Algorithm):
    """A method as a user would add it."""

    name = "toy"
    title = "Toy"
    paper = "this file"

    average: str = "episode"  # type: ignore[assignment]

    def advantage(self, traj: Trajectory) -> Advantage:
        return Advantage(return_to_go(traj))

    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return reinforce(logp, adv)


class WrongSign(Toy):
    def loss(self, logp: Tensor, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Tensor:
        return -reinforce(logp, adv)


class FalseModesty(Toy):
    bias = "none that anyone can see"


def recipe(**settings) -> VerifyRecipe:
    return VerifyRecipe(**{"seeds": 1, "iterations": 120, "workers": 1, **settings})


def test_a_new_method_is_one_class_and_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(ALGORITHMS, "toy", Toy)
    file = tmp_path / "verify.json"
    summary = run(recipe(only="toy, dpo", json=str(file)))
    written = json.loads(file.read_text())
    assert written == summary
    assert written["passed"]
    (row,) = written["methods"]
    assert row["gradient"]["shipped"] < 1e-8
    assert len(row["way"]) == 1
    assert row["way"][0] > 0.95
    assert written["offline"][0]["name"] == "dpo"
    assert written["offline"][0]["holds"]
    printed = capsys.readouterr().out
    assert "Toy" in printed
    assert "pi ~ pi_ref exp(r / beta)" in printed
    assert max(map(len, printed.splitlines())) <= 118


@pytest.mark.parametrize(
    ("wrong", "words"), [(WrongSign, "its gradient deviates by 2.0"), (FalseModesty, "its gradient is exact")]
)
def test_a_wrong_method_fails_by_name_after_its_numbers_are_written(monkeypatch, tmp_path, wrong, words):
    monkeypatch.setitem(ALGORITHMS, "toy", wrong)
    file = tmp_path / "verify.json"
    with pytest.raises(SteersmanError, match=f"toy: .*{words}"):
        run(recipe(only="toy", iterations=2, json=str(file)))
    assert not json.loads(file.read_text())["passed"]


def test_too_small_a_budget_is_named():
    with pytest.raises(SteersmanError, match=r"rloo: .*% of the way to the optimum"):
        run(recipe(only="rloo", iterations=2))


def test_an_unknown_name_is_refused(capsys):
    assert main(["verify", "--only", "rlo"]) == 2
    assert "did you mean rloo" in capsys.readouterr().err


def test_settings_come_from_the_command_line():
    given = load_recipe(VerifyRecipe, None, ["--only", "reinforce++,dpo", "--json", "out.json", "--seeds", "2"])
    assert (given.only, given.json, given.seeds) == ("reinforce++,dpo", "out.json", 2)


def test_identities_hold():
    rows = identities()
    assert len(rows) == 14
    assert failures([], [], rows) == []


@pytest.mark.parametrize("broken", ["td_error", "return_to_go", "leave_one_out"])
def test_a_broken_estimator_breaks_its_identity(monkeypatch, broken):
    from steersman.verify import identities as module

    whole = getattr(module, broken)
    monkeypatch.setattr(module, broken, lambda *args, **kwargs: -whole(*args, **kwargs))
    assert failures([], [], identities())


def test_a_broken_correction_breaks_its_identity(monkeypatch):
    true = Correction.weight
    monkeypatch.setattr(Correction, "weight", lambda *args: -true(*args))
    assert failures([], [], identities())


def test_nan_is_a_failure():
    from steersman.verify.gradient import GradientCheck

    nan = float("nan")
    check = GradientCheck(nan, nan, nan)
    row = Method("x", "X", "p", "", "", check, check, [nan], [nan], [], 0.0)
    assert len(failures([row], [], [])) >= 5


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(tmp_path):
    torch.set_num_threads(1)
    settings = {"only": "rloo,dr-grpo,cispo", "iterations": 120}
    one, two = run(recipe(**settings)), run(recipe(**settings, workers=2))
    assert [m["way"] for m in one["methods"]] == [m["way"] for m in two["methods"]]
