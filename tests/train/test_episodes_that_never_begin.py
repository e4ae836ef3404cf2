"""An episode whose environment could not begin has no part in its group, in baselines, means and looks."""

from __future__ import annotations

import pytest
import torch
from letter_models import save_mini
from train_kit import merge, recipe, rows, settings, weights

from steersman.reward import Scores
from steersman.train.on_policy import with_signal
from steersman.types import Prompt, Sample, SteersmanError
from steersman.verbs import rl

FLAKY = '''
COUNT = [0]


class Flaky:
    """Pays 1 to every episode that begins; each third of them does not."""

    def __init__(self, every=3):
        self.every = every

    def begin(self, row):
        COUNT[0] += 1
        if COUNT[0] % self.every == 0:
            raise ConnectionError("no board today")

    def step(self, text):
        return "x", 1.0, True
'''


@pytest.fixture
def flaky(tmp_path):
    (tmp_path / "flaky.py").write_text(FLAKY)
    values = {
        "reward.parts": {"play": {"environment": "turn"}}, "rollout.max_new_tokens": 4, "rollout.samples": 4,
        "environment": {"path": f"{tmp_path / 'flaky.py'}:Flaky", "workers": 1}, "iterations": 2,
        "algorithm.beta": 0.0, "rollout.held_out": 3, "run.eval_every": 1,
    }  # fmt: skip
    return merge(settings(tmp_path, save_mini(tmp_path / "mini", context=128)), values)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("grpo", {}),
        ("grpo", {"reward.normalise": True}),
        ("rloo", {}),
        ("dapo", {}),
        ("remax", {"rollout.samples": 1}),
    ],
)  # fmt: skip
def test_what_was_said_beside_a_failure_is_not_pushed(method, more, flaky, tmp_path):
    """All that began earned the same, so that no method may change a weight."""
    rl.run(recipe(method, merge(flaky, more)))
    before, after = weights(tmp_path / "mini"), weights(tmp_path / "run" / "model")
    assert all(torch.equal(before[name], after[name]) for name in after)
    for row in rows(tmp_path / "run"):
        if row["step"]:
            assert row["reward/total"] == 1.0
            assert 0 < row["episode/fault"] < 1
        assert row["held_out/reward/total"] == 1.0


def test_a_group_is_kept_whole_or_not_at_all():
    """What could not begin goes with its group, whose signal the others decide."""

    def sample(group, counts):
        return Sample(Prompt([1], "p", index=group), [1], [0.0], "length", mask=[counts])

    samples = [sample(0, True), sample(0, True), sample(0, False), sample(1, True), sample(1, True), sample(1, False)]
    score = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 0.0])
    assert with_signal(samples, Scores(score, {"r": score})) == [3, 4, 5]


def test_a_run_without_a_single_episode_ends_with_the_reason(flaky):
    with pytest.raises(SteersmanError, match=r"in none of 3 episodes .* ConnectionError: no board today.*--resume"):
        rl.run(recipe("grpo", merge(flaky, {"environment.args": {"every": 1}})))
