"""Prompts drawn by difficulty: the expected gradient stays exact, draws follow the pass rates, and runs resume."""

from __future__ import annotations

import pytest
import torch
from train_kit import merge, plain, recipe, rows, weights

from steersman.algorithms import ALGORITHMS
from steersman.recipe.curriculum import CurriculumConfig
from steersman.train.curriculum import Curriculum
from steersman.types import Prompt
from steersman.verbs import rl
from steersman.verify.curriculum import check_curriculum


@pytest.mark.parametrize("name", ["rloo", "reinforce", "dr-grpo", "a2c", "gpg"])
def test_the_weight_makes_the_expected_gradient_exact(name):
    assert check_curriculum(ALGORITHMS[name]()) < 1e-12


def asked(count, **settings):
    prompts = [Prompt([3], "x", index=10 * i) for i in range(count)]
    return Curriculum(CurriculumConfig(**settings), prompts, 0), prompts


def test_draws_and_weights_follow_the_pass_rates():
    made, prompts = asked(3, uniform=0.25, forget=0.0, right_from=0.5)
    assert torch.allclose(made.probability(), torch.full((3,), 1 / 3, dtype=torch.float64))
    answered = [prompts[0]] * 4 + [prompts[1]] * 4
    made.outcome(answered, torch.tensor([1.0, 1, 1, 1, 1, 0, 1, 0]))
    rate = torch.tensor([5 / 6, 3 / 6, 1 / 2], dtype=torch.float64)
    teaches = rate * (1 - rate)
    wanted = 0.25 / 3 + 0.75 * teaches / teaches.sum()
    torch.testing.assert_close(made.probability(), wanted)
    weight = made.weight([prompts[1], prompts[0]])
    assert weight is not None
    torch.testing.assert_close(weight, 1 / (3 * wanted[[1, 0]]))
    torch.testing.assert_close((wanted / (3 * wanted)).sum(), torch.tensor(1.0, dtype=torch.float64))
    drawn = torch.bincount(torch.tensor(made.draw(20_000)), minlength=3) / 20_000
    torch.testing.assert_close(drawn.double(), wanted, atol=0.015, rtol=0)


def test_earlier_tries_fade():
    made, prompts = asked(2, forget=0.5, right_from=1.0)
    made.outcome([prompts[0]] * 2, torch.ones(2))
    made.outcome([prompts[0]] * 2, torch.zeros(2))
    assert made.right.tolist() == [1.0, 0.0]
    assert made.tries.tolist() == [3.0, 0.0]


def test_a_run_is_weighted_and_resumes_bit_for_bit(base, tmp_path, monkeypatch):
    values = merge(base, {"curriculum": {"right_from": 0.5}, "iterations": 4, "run.save_every": 2})
    rl.run(recipe("rloo", values))
    seen = rows(tmp_path / "run")
    assert seen[-1]["curriculum/largest_weight"] > 1
    cut = merge(values, {"run.dir": str(tmp_path / "cut")})
    from steersman.train.on_policy import OnPolicy

    real, left = OnPolicy.iteration, [3]

    def iteration(self):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(OnPolicy, "iteration", iteration)
        with pytest.raises(KeyboardInterrupt):
            rl.run(recipe("rloo", cut))
    rl.run(recipe("rloo", cut), resume=True)
    assert [plain(r) for r in seen] == [plain(r) for r in rows(tmp_path / "cut")]
    a, b = weights(tmp_path / "run" / "model"), weights(tmp_path / "cut" / "model")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_it_is_refused_where_prompts_are_chosen_otherwise(base):
    with pytest.raises(ValueError, match=r"replaces groups itself \(DAPO: yes\)"):
        recipe("dapo", merge(base, {"curriculum": {}}))
