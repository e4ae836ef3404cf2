"""From samples and scores to a trajectory, by numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from train_kit import merge

from steersman.advantage.returns import return_to_go
from steersman.algorithms import ALGORITHMS
from steersman.reward import RewardConfig, ScoreShaping
from steersman.train.experience import EpisodeRules, behaviour_logp, tokens_of, trajectory
from steersman.types import Prompt, Sample

SAMPLES = [
    Sample(Prompt([4, 5], "", index=7), [6, 7, 2], [-1.0, -2.0, -0.5], "eos"),
    Sample(Prompt([4], "", index=3), [8, 9], [-0.25, -0.75], "length"),
    Sample(Prompt([4, 4, 4], "", index=7), [9], [-3.0], "stop"),
]
REF = torch.tensor([[-1.5, -1.0, -0.5], [-0.25, -1.75, 9.0], [-2.0, 9.0, 9.0]])
SCORE = torch.tensor([2.0, -1.0, 0.5])


def made(beta: float, name: str = "ppo", settings: dict | None = None, **given):
    algorithm = ALGORITHMS[name](**{"gamma": 0.9, **(settings or {})})
    return algorithm, trajectory(SAMPLES, tokens_of(SAMPLES), SCORE, algorithm, beta=beta, **given)


def test_kl_at_every_token_and_the_score_at_the_last_only():
    _, traj = made(0.2, logp_ref=REF)
    # -0.2 * (logp - logp_ref), and the score where the response ends
    expected = [
        [-0.2 * 0.5, -0.2 * -1.0, 2.0],
        [0.0, -0.2 * 1.0 - 1.0, 0.0],
        [-0.2 * -1.0 + 0.5, 0.0, 0.0],
    ]
    torch.testing.assert_close(traj.reward, torch.tensor(expected))
    assert traj.mask.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert traj.group.tolist() == [7, 3, 7]
    torch.testing.assert_close(traj.logp_old, torch.tensor([[-1.0, -2.0, -0.5], [-0.25, -0.75, 0], [-3.0, 0, 0]]))


def test_a_penalty_that_belongs_to_the_loss_is_not_in_the_reward():
    _, traj = made(0.2, settings={"kl_in": "loss", "kl_estimator": "k2"}, logp_ref=REF)
    torch.testing.assert_close(traj.reward, torch.tensor([[0, 0, 2.0], [0, -1.0, 0], [0.5, 0, 0]]))
    _, none = made(0.2)
    torch.testing.assert_close(none.reward, traj.reward)


def test_every_response_ends_where_it_was_judged():
    _, traj = made(0.0)
    expected = [[0.9, 0.9, 0.0], [0.9, 0.0, 0.9], [0.0, 0.9, 0.9]]
    torch.testing.assert_close(traj.discount, torch.tensor(expected))
    torch.testing.assert_close(traj.reward, torch.tensor([[0, 0, 2.0], [0, -1.0, 0], [0.5, 0, 0]]))


def test_a_cut_that_bootstraps_withholds_the_score_and_goes_on():
    _, traj = made(0.2, logp_ref=REF, rules=EpisodeRules("bootstrap"))
    expected = [[0.9, 0.9, 0.0], [0.9, 0.9, 0.9], [0.0, 0.9, 0.9]]
    torch.testing.assert_close(traj.discount, torch.tensor(expected))
    # the KL penalty stays
    torch.testing.assert_close(traj.reward, torch.tensor([[-0.1, 0.2, 2.0], [0, -0.2, 0], [0.7, 0, 0]]))
    _, dense = made(
        0.0, rules=EpisodeRules("bootstrap"), per_token=torch.tensor([[1.0, 0, 0], [5.0, 6, 0], [0.5, 0, 0]])
    )
    torch.testing.assert_close(dense.reward, torch.tensor([[1.0, 0, 1.0], [0, 0, 0], [0.5, 0, 0]]))


@pytest.mark.parametrize("cut", ["end", "bootstrap"])
def test_gae_bootstraps_only_the_response_that_was_cut(cut):
    value = torch.tensor([[1.0, 2.0, 3.0, 50.0], [4.0, 5.0, 6.0, 70.0], [1.5, 80.0, 90.0, 90.0]])
    algorithm, traj = made(0.0, settings={"lam": 0.5, "whiten": False}, rules=EpisodeRules(cut))
    traj.value = value
    adv, ret = algorithm.advantage(traj)
    d2 = 2.0 - 3.0
    d1 = 0.9 * 3.0 - 2.0
    d0 = 0.9 * 2.0 - 1.0
    e1 = 0.9 * 6.0 - 5.0 if cut == "bootstrap" else -1.0 - 5.0  # V after the cut, or the score
    e0 = 0.9 * 5.0 - 4.0
    f0 = 0.5 - 1.5
    expected = [[d0 + 0.45 * (d1 + 0.45 * d2), d1 + 0.45 * d2, d2], [e0 + 0.45 * e1, e1, 0.0], [f0, 0.0, 0.0]]
    torch.testing.assert_close(adv, torch.tensor(expected))
    torch.testing.assert_close(ret, torch.where(traj.mask, torch.tensor(expected) + value[:, :-1], 0.0))


def test_whitened_rewards_have_variance_one_and_keep_their_mean():
    _, plain = made(0.2, logp_ref=REF)
    _, white = made(0.2, logp_ref=REF, rules=EpisodeRules(whiten=True))
    before, after = plain.reward[plain.mask].double(), white.reward[white.mask].double()
    mean = sum(before.tolist()) / 6
    spread = math.sqrt(sum((x - mean) ** 2 for x in before.tolist()) / 6)
    expected = [(x - mean) / spread + mean for x in before.tolist()]
    torch.testing.assert_close(after, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert white.reward[~white.mask].abs().sum() == 0


def test_a_reward_per_token_stands_at_its_tokens_and_the_rest_of_the_score_at_the_end():
    per_token = torch.tensor([[0.5, 0.25, 0.25], [1.0, -2.0, 77.0], [0.5, 77.0, 77.0]])
    _, traj = made(0.0, per_token=per_token)
    # the score of row 0 is 2, of which 1 stands at tokens already: the last one gets the other 1
    torch.testing.assert_close(traj.reward, torch.tensor([[0.5, 0.25, 1.25], [1.0, -2.0, 0], [0.5, 0, 0]]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"missing_eos_penalty": 0.5}, [2.0, -1.5, 0.5]),
        ({"clip": 0.75}, [0.75, -0.75, 0.5]),
        ({"clip": 0.75, "missing_eos_penalty": 1.0}, [0.75, -1.75, 0.5]),
        # scores 2, -1, 0.5: mean 0.5, deviation sqrt(1.5)
        ({"normalise": True}, [1.5 / 1.5**0.5, -1.5 / 1.5**0.5, 0.0]),
        ({"normalise": True, "clip": 1.0}, [1.0, -1.0, 0.0]),
        # limit 3, buffer 2: length 3 loses 1, length 2 loses 0.5
        ({"overlong_buffer": 2}, [1.0, -1.5, 0.5]),
    ],
)
def test_scores_are_shaped_before_they_become_rewards(settings, expected):
    shaping = ScoreShaping(RewardConfig(**settings))
    ended, length = torch.tensor([s.terminated for s in SAMPLES]), torch.tensor([len(s.ids) for s in SAMPLES])
    score, stats = shaping(SCORE, ended, length, 3)
    torch.testing.assert_close(score, torch.tensor(expected))
    assert stats["score/mean"] == 0.5


def test_behaviour_logp_is_what_was_recorded():
    assert behaviour_logp(SAMPLES, 4)[1].tolist() == [-0.25, -0.75, 0.0, 0.0]


def test_the_recipe_reaches_the_trajectory(base):
    """`reward.whiten` and the missing-EOS penalty act in the loop, not only in the functions."""
    from test_every_algorithm import on_policy

    asked = merge(base, {"reward.whiten": True, "reward.missing_eos_penalty": 2.0})
    state = on_policy("ppo", asked)
    samples, scores = state.sample(state.next_prompts())
    _, traj, _ = state.experience(samples, scores)
    assert any(s.finish == "length" for s in samples)
    assert float(traj.reward[traj.mask].double().var(correction=0)) == pytest.approx(1.0, rel=1e-3)
    plain = on_policy("ppo", merge(base, {"reward.missing_eos_penalty": 2.0}))
    _, traj, _ = plain.experience(*plain.sample(plain.next_prompts()))
    for row, sample in enumerate(samples):
        expected = sample.text.count("a") / 4 - 2.0 * (sample.finish == "length")
        assert float(traj.reward[row].sum()) == pytest.approx(expected, abs=1e-5)


HOLES = [
    [True, False, True, True, False, False],  # a hole and a tail
    [False, True, True, False, True, False],  # a hole in front, one inside, a tail
    [True, True, False, False, False, False],
    [False, False, False, False, True, True],
]


def with_holes(mask: torch.Tensor, score: torch.Tensor, logp: list[list[float]], finish: list[str]):
    """The samples under the mask, and the same samples with nothing but what counts."""
    who = [Prompt([4, 5], "", index=i // 2) for i in range(len(mask))]
    holed = [Sample(w, list(range(4, 10)), row, end) for w, row, end in zip(who, logp, finish, strict=True)]
    kept = [
        Sample(w, [3] * int(m.sum()), [x for x, on in zip(row, m.tolist(), strict=True) if on], end)
        for w, m, row, end in zip(who, mask, logp, finish, strict=True)
    ]
    return (holed, replace(tokens_of(holed), mask=mask)), (kept, tokens_of(kept))


@pytest.mark.parametrize("cut", ["end", "bootstrap"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_steps_that_do_not_count_change_no_advantage(name, cut):
    """Holes, and tails behind the last step that counts: as if those steps were not there (a turn of a tool, say)."""
    mask, g = torch.tensor(HOLES), torch.Generator().manual_seed(1)
    logp = (-torch.rand(4, 6, generator=g)).tolist()
    score = torch.tensor([2.0, -1.0, 0.5, 3.0])
    finish = ["eos", "length", "eos", "stop"]
    algorithm = ALGORITHMS[name](gamma=0.9)
    value = torch.randn(4, 7, generator=g)
    found = []
    for samples, tokens in with_holes(mask, score, logp, finish):
        traj = trajectory(samples, tokens, score, algorithm, rules=EpisodeRules(cut))
        width = tokens.mask.shape[1]
        traj.value, traj.baseline = torch.zeros(4, width + 1), torch.tensor([0.1, 0.2, 0.3, 0.4])
        for b in range(4):
            at = mask[b].nonzero().flatten()
            here = tokens.mask[b].nonzero().flatten()
            traj.value[b, here] = value[b, at]
            traj.value[b, here[-1] + 1] = value[b, -1]
        out = algorithm.advantage(traj)
        found.append([None if x is None else x[tokens.mask] for x in (out.adv, out.ret)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_a_terminated_episode_does_not_bootstrap_behind_its_mask():
    """Reward 1, ended, and a critic that says 5 of the states behind the mask: the return is 1, not 6."""
    sample = Sample(Prompt([4], ""), [5, 6, 7], [0.0, 0.0, 0.0], "eos")
    tokens = replace(tokens_of([sample]), mask=torch.tensor([[True, False, False]]))
    traj = trajectory([sample], tokens, torch.tensor([1.0]), ALGORITHMS["ppo"]())
    traj.value = torch.full((1, 4), 5.0)
    assert return_to_go(traj)[0, 0].item() == 1.0


def test_what_an_environment_wrote_counts_nowhere():
    """Its tokens have a mask of False: no reward, no advantage, and no place in a denominator."""
    asked = Prompt([4, 5], "", index=0)
    played = Sample(asked, [6, 7, 8, 9], [-1.0, 0.0, 0.0, -2.0], "eos", mask=[True, False, False, True])
    plain = Sample(asked, [6, 7], [-1.0, -2.0], "eos")
    tokens = tokens_of([played, plain])
    assert tokens.mask.tolist() == [[True, False, False, True], [True, True, False, False]]
    traj = trajectory([played, plain], tokens, torch.tensor([1.0, 2.0]), ALGORITHMS["ppo"](gamma=0.5))
    assert traj.reward.tolist() == [[0, 0, 0, 1.0], [0, 2.0, 0, 0]]
    assert return_to_go(traj).tolist() == [[0.5, 0, 0, 1.0], [1.0, 2.0, 0, 0]]
