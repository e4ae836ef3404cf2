"""The recent methods in the loop: several rewards reach GDPO apart, and what can not be combined is refused."""

from __future__ import annotations

import pytest
import torch
from test_every_algorithm import on_policy
from train_kit import merge, recipe, rewards_file

from steersman.types import SteersmanError


def two_rewards(tmp_path) -> dict:
    path = rewards_file(tmp_path)
    letters = {"function": f"{path}:count_a", "weight": 2.0}
    return {"letters": letters, "same": {"function": f"{path}:constant", "weight": 0.5}}


def test_gdpo_is_given_every_reward_beside_its_weight(base, tmp_path):
    state = on_policy("gdpo", merge(base, {"reward.parts": two_rewards(tmp_path)}))
    samples, scores = state.sample(state.next_prompts())
    _, traj, _ = state.experience(samples, scores)
    assert traj.parts is not None
    torch.testing.assert_close(traj.parts[:, 0, 0], scores.parts["letters"])
    assert traj.parts[:, :, 1].unique().tolist() == [0.5, 2.0]
    torch.testing.assert_close(traj.parts.prod(-1).sum(-1), scores.total)
    _, other, _ = on_policy("grpo", base).experience(samples, scores)
    assert other.parts is None


@pytest.mark.parametrize("setting", [{"reward__normalise": True}, {"reward__whiten": True}, {"reward__clip": 1.0}])
def test_gdpo_refuses_what_rescales_the_sum(setting, base):
    with pytest.raises((SteersmanError, ValueError), match="a scale of its own; remove"):
        recipe("gdpo", base, **setting)


def test_the_best_of_more_than_there_are_is_refused(base):
    with pytest.raises((SteersmanError, ValueError), match=r"algorithm\.k = 9 exceeds rollout\.samples = 2"):
        recipe("pass-at-k", base, rollout__samples=2, algorithm__k=9)
