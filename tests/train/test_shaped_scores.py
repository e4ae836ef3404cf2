"""What shaping does to a score does not decide which answers a method calls right or efficient."""

from __future__ import annotations

import pytest
import torch
from letter_models import save_mini
from train_kit import merge, recipe, settings

from steersman.algorithms import Coefficients
from steersman.train.on_policy import OnPolicy
from steersman.train.roles import build_roles
from steersman.verbs.rl import _prompts

RIGHT = """
def right(prompts, completions):
    return [float(i % 8 != 0) for i in range(len(completions))]

def longer_is_better(prompts, completions, samples):
    return [float(len(s.ids)) ** 1.5 for s in samples]
"""


SHAPINGS: list[dict[str, object]] = [
    {}, {"reward.normalise": True}, {"reward.clip": 0.4}, {"reward.missing_eos_penalty": 0.7},
    {"reward.whiten": True},
]  # fmt: skip


class _Batches:
    def forever(self):
        while True:
            yield [0]


@pytest.fixture
def experience(tmp_path):
    """The method, and the samples, scores and trajectory of a first iteration."""
    torch.set_num_threads(1)
    (tmp_path / "right.py").write_text(RIGHT)
    values = merge(settings(tmp_path, save_mini(tmp_path / "m")), {"rollout.prompts": 8, "rollout.samples": 4})

    def made(name, reward, **changes):
        parts = {"reward.parts": {"s": {"function": f"{tmp_path / 'right.py'}:{reward}"}}}
        found = recipe(name, merge(values, parts | changes))
        roles = build_roles(found, torch.device("cpu"))
        train = _prompts(found, roles).train
        samples = roles.generate(train[:8], seed=(0, 0), n=4)
        scores = roles.score(samples)
        _, traj, _ = OnPolicy(found, roles, train, _Batches()).experience(samples, scores)
        return found.algorithm, samples, scores.total, traj

    return made


@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
def test_vapo_imitates_what_the_rewards_call_right(experience, shaping):
    algorithm, _, scores, traj = experience("vapo", "right", **shaping)
    logp = torch.full_like(traj.reward, -0.5)
    loss = algorithm.loss(logp, traj, torch.zeros_like(logp), Coefficients())
    assert (loss[:, 0] / (0.5 * algorithm.imitate)).tolist() == pytest.approx(scores.tolist())


def test_vapo_imitates_no_answer_whose_score_is_withheld(experience):
    algorithm, samples, scores, traj = experience("vapo", "right", **{"critic.cut": "bootstrap"})
    logp = torch.full_like(traj.reward, -0.5)
    loss = algorithm.loss(logp, traj, torch.zeros_like(logp), Coefficients())
    ended = [float(s.terminated) for s in samples]
    assert 0 < sum(ended) < len(ended)
    assert (loss[:, 0] / (0.5 * algorithm.imitate)).tolist() == pytest.approx((scores * torch.tensor(ended)).tolist())


@pytest.mark.parametrize("shaping", [{}, {"reward.normalise": True}])
def test_gfpo_keeps_those_that_the_rewards_call_efficient(experience, shaping):
    """Scores that grow faster than the length: of each four answers the two longest have most per token."""
    settings = {"algorithm.by": "efficiency", "rollout.max_new_tokens": 40, **shaping}
    algorithm, samples, _, traj = experience("gfpo", "longer_is_better", **settings)
    lengths = torch.tensor([len(s.ids) for s in samples]).view(8, 4)
    learned = algorithm.advantage(traj).adv.abs().sum(1).view(8, 4) > 0
    checked = 0
    for row, kept in zip(lengths, learned, strict=True):
        order = row.sort().values
        if order[1] < order[2] < order[3]:  # else it is open which are kept, or they are as good as each other
            assert kept.tolist() == (row >= order[2]).tolist()
            checked += 1
    assert checked
