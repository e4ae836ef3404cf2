"""What every on-policy method refuses by name; and a constant reward, which is said and harmless."""

from __future__ import annotations

import math

import pytest
import torch
from train_kit import recipe, rewards_file

from steersman.algorithms import ALGORITHMS
from steersman.config.load import load_recipe
from steersman.data import Batches
from steersman.train.on_policy import OnPolicy
from steersman.train.roles import build_roles
from steersman.types import Prompt, SteersmanError
from steersman.verbs.on_policy_recipes import RECIPES


@pytest.mark.parametrize("name", [n for n, a in ALGORITHMS.items() if a.group])
def test_a_group_of_one_is_refused(name, base):
    with pytest.raises(ValueError, match=r"rollout\.samples is 1; give at least 2"):
        recipe(name, base, rollout__samples=1)


@pytest.mark.parametrize("name", [n for n, a in ALGORITHMS.items() if not a.critic])
def test_a_method_without_critic_refuses_its_settings(name, base):
    with pytest.raises(ValueError, match="has no critic; remove the section `critic`"):
        recipe(name, base, critic__value_clip=0.1)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("value", ["-0.1", "1.01"])
def test_discount_and_lambda_are_shares(name, value):
    keys = ["gamma", "lam"] if "lam" in ALGORITHMS[name].model_fields else ["gamma"]
    for key in keys:
        with pytest.raises(SteersmanError, match=rf"algorithm\.{key}: {value} was given; allowed: number >= 0 <= 1"):
            load_recipe(RECIPES[name], None, [f"--algorithm.{key}", value])


# a method that takes rewards apart refuses what rescales their sum; of optimal values see test_optimal_values.py
SHAPED = [(name, shaping) for name, method in ALGORITHMS.items() for shaping in ({}, {"normalise": True})
          if not (method.parts and shaping) and method.baseline != "optimal"]  # fmt: skip


@pytest.mark.parametrize(("name", "shaping"), SHAPED)
def test_a_constant_reward_is_said_and_divides_nothing_by_zero(name, shaping, base, tmp_path):
    """Without KL there is nothing to learn from at all: only a critic's error, or a sum of equal returns, is left."""
    parts = {"score": {"function": f"{rewards_file(tmp_path)}:constant"}}
    asked = recipe(name, base, reward={"parts": parts, **shaping}, algorithm__beta=0.0)
    state = OnPolicy(
        asked, build_roles(asked, torch.device("cpu")), [Prompt([3 + i], "", index=i) for i in range(12)],
        Batches(12, asked.rollout.prompts, 0, drop_last=True),
    )  # fmt: skip
    before = [p.detach().clone() for p in state.roles.policy.parameters()]
    seen = state.iteration()
    assert "nothing to learn from" in seen.notes[0]
    assert all(math.isfinite(x) for x in seen.stats.values()), seen.stats
    after = list(state.roles.policy.parameters())
    assert all(torch.isfinite(p).all() for p in after)
    if asked.algorithm.group or name == "remax":
        assert all(torch.equal(p, old) for p, old in zip(after, before, strict=True)), "equal answers teach nothing"
