"""A*-PO's values before training: of responses that the first policy gives once, and kept in the run folder."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from pydantic import ValidationError
from train_kit import merge, recipe, rows, weights

from steersman import cli
from steersman.run.seed import SamplingStream
from steersman.train.optimal_values import FOLDER, soft_mean
from steersman.train.roles import Roles, build_roles
from steersman.types import SteersmanError
from steersman.verbs import rl


@pytest.fixture
def drawn(monkeypatch):
    """The prompts of every call that drew responses for the values."""
    calls, generate = [], Roles.generate

    def watched(self, prompts, *, seed, n, greedy=False):
        if seed[1:] == (SamplingStream.OPTIMAL_VALUES,):
            calls.append([p.index for p in prompts])
        return generate(self, prompts, seed=seed, n=n, greedy=greedy)

    monkeypatch.setattr(Roles, "generate", watched)
    return calls


def kept(folder) -> list[dict]:
    files = sorted((folder / FOLDER).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_values_are_of_the_start_s_own_responses_and_stand_in_every_iteration(base, tmp_path, drawn):
    asked = recipe("a2po", base, algorithm__value_samples=3, algorithm__value_beta=0.2, run__keep_best=0)
    rl.run(asked)
    assert [i for call in drawn for i in call] == list(range(12))
    told = kept(tmp_path / "run")
    roles = build_roles(asked, torch.device("cpu"))
    train = rl._prompts(asked, roles).train
    samples = roles.generate(train, seed=(0, SamplingStream.OPTIMAL_VALUES), n=3)
    expected = torch.tensor([s.text.count("a") / 4 for s in samples]).view(12, 3)
    torch.testing.assert_close(torch.tensor([row["score"] for row in told]), expected)
    values = [soft_mean(row["score"], 0.2) for row in told]
    for row in rows(tmp_path / "run")[1:]:
        assert min(values) - 1e-6 <= row["value/optimal"] <= max(values) + 1e-6


def test_a_resumed_run_draws_none_again_and_ends_alike(base, tmp_path, drawn):
    whole = rl.run(recipe("a2po", base, iterations=3, run__dir=str(tmp_path / "whole")))
    drawn.clear()
    rl.run(recipe("a2po", base))
    assert len(drawn) == 1
    again = rl.run(recipe("a2po", base, iterations=3), resume=True)
    assert len(drawn) == 1
    a, b = weights(tmp_path / "whole" / "model"), weights(tmp_path / "run" / "model")
    assert whole["steps"] == again["steps"] == 3
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_another_beta_needs_no_new_responses_and_another_reward_is_refused_once_trained(base, tmp_path, drawn):
    rl.run(recipe("a2po", base))
    rl.run(recipe("a2po", base, iterations=3, algorithm__value_beta=0.1), resume=True)
    assert len(drawn) == 1
    with pytest.raises(SteersmanError, match=r"drawn again \(reward\.clip: None -> 0\.5\).* 3 iterations since"):
        rl.run(recipe("a2po", base, iterations=4, reward__clip=0.5), resume=True)
    assert len(kept(tmp_path / "run")) == 12


def test_a_signal_before_the_first_step_keeps_what_was_drawn(base, tmp_path, drawn, monkeypatch, capfd):
    """Pieces of four prompts; the signal comes while the second is scored."""
    monkeypatch.setattr("steersman.train.optimal_values.piece_size", lambda *_: 4)
    whole = merge(base, {"run.dir": str(tmp_path / "whole")})
    rl.run(recipe("a2po", whole))
    assert len(drawn) == 3
    score, calls = Roles.score, []

    def scored(self, samples):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, samples)

    monkeypatch.setattr(Roles, "score", scored)
    drawn.clear()
    summary = rl.run(recipe("a2po", base))
    assert (summary["finished"], summary["steps"]) == (False, 0)
    assert "stopped before the first step by SIGTERM" in " ".join("".join(capfd.readouterr()).split())
    assert len(kept(tmp_path / "run")) == 8
    assert not rows(tmp_path / "run")
    assert rl.run(recipe("a2po", base), resume=True)["finished"]
    assert drawn == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    a, b = weights(tmp_path / "whole" / "model"), weights(tmp_path / "run" / "model")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_settings_that_changed_before_the_first_step_draw_anew(base, tmp_path, drawn, monkeypatch):
    prepare = rl.prepare_values
    monkeypatch.setattr(rl, "prepare_values", lambda *given: prepare(*given) and False)
    rl.run(recipe("a2po", base))
    monkeypatch.setattr(rl, "prepare_values", prepare)
    rl.run(recipe("a2po", base, reward__clip=0.25), resume=True)
    assert len(drawn) == 2
    assert max(max(row["score"]) for row in kept(tmp_path / "run")) <= 0.25


def test_prompts_that_no_response_solved_are_left_out(base, tmp_path, capfd):
    (tmp_path / "halves.py").write_text(
        "def score(prompts, completions, samples):\n    return [float(s.prompt.index % 2) for s in samples]\n"
    )
    half = merge(base, {"reward.parts": {"score": {"function": f"{tmp_path / 'halves.py'}:score"}}})
    rl.run(recipe("a2po", half, algorithm__solved_above=0.0, iterations=4))
    assert "6 of them left out" in " ".join("".join(capfd.readouterr()).split())
    assert [row["reward/total"] for row in rows(tmp_path / "run")[1:]] == [1.0] * 4
    rl.run(recipe("a2po", half, iterations=2, run__dir=str(tmp_path / "all")))
    assert any(row["reward/total"] < 1 for row in rows(tmp_path / "all")[1:])
    with pytest.raises(SteersmanError, match=r"solved_above 1: of 12 prompts 0 have .* an iteration takes 4"):
        rl.run(recipe("a2po", half, algorithm__solved_above=1.0, run__dir=str(tmp_path / "none")))


def test_a_constant_reward_leaves_the_start_as_it_is(base, tmp_path, mini, capfd):
    """Every score is the value of its prompt, and the policy is its reference: an error of 0."""
    constant = merge(base, {"reward.parts.score.function": f"{tmp_path / 'rewards.py'}:constant", "iterations": 1})
    rl.run(recipe("a2po", constant, run__eval_every=1))
    row = rows(tmp_path / "run")[1]
    assert row["value/optimal"] == pytest.approx(1.0)
    assert row["loss/policy"] == pytest.approx(0.0, abs=1e-9)
    assert "nothing to learn from" in " ".join("".join(capfd.readouterr()).split())


def test_it_samples_ahead_and_with_adapters(base, tmp_path):
    ahead = {"rollout.engine": "process", "rollout.ahead": 1, "iterations": 2}
    assert rl.run(recipe("a2po", merge(base, ahead)))["finished"]
    lora = {"model.lora": {"r": 2}, "run.dir": str(tmp_path / "lora")}
    assert rl.run(recipe("a2po", merge(base, lora)))["finished"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": "none"}, "must be the reference"),
        ({"reference": "other"}, "must be the reference"),
        ({"reward.normalise": True}, "estimated once"),
        ({"reward.whiten": True}, "estimated once"),
        ({"algorithm.solved_above": 0.0, "curriculum": {}}, "leaves prompts out for good"),
        ({"algorithm.beta": 0.0}, "greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(changes, said, base):
    with pytest.raises(ValidationError, match=said):
        recipe("a2po", merge(base, changes))


def test_the_command_line_says_what_comes_before_training(base, tmp_path, capfd):
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    assert cli.main(["a2po", str(path)]) == 0
    said = " ".join("".join(capfd.readouterr()).split())
    assert "8 responses of the reference to each of 12 prompts" in said
    assert "optimal value of 12 prompts" in said
