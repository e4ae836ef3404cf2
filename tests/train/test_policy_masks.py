"""Masks on the policy's loss in the loop: of the whole batch however it is split, and of the policy alone."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, log

import pytest
import torch
from test_every_algorithm import on_policy
from test_gradients import LENGTHS, experience, gradients, learner, same
from train_kit import merge, recipe, rows, weights

from steersman.algorithms import Coefficients
from steersman.types import SteersmanError
from steersman.verbs import rl

MASKS = {"top_entropy": 0.4, "off_policy_threshold": 0.02}


@pytest.mark.parametrize("average", ["token", "sequence", "episode"])
@pytest.mark.parametrize("shared", [False, True])
def test_micro_batches_change_no_gradient_under_masks(average, shared, tmp_path):
    given = experience()
    settings = {"average": average, "shared": shared, "tmp_path": tmp_path, **MASKS}
    whole = gradients(learner(**settings), *given)
    for micro in (1, 20):
        same(whole, gradients(learner(micro=micro, **settings), *given))


def test_masks_take_from_the_policy_and_leave_the_critic_as_it_is(tmp_path):
    given = experience()
    plain = gradients(learner(tmp_path=tmp_path), *given)
    for setting, value in MASKS.items():
        masked = gradients(learner(tmp_path=tmp_path, **{setting: value}), *given)
        same(*({n: x for n, x in found.items() if n.startswith("critic")} for found in (plain, masked)), exactly=True)
        assert any(not torch.allclose(plain[n], masked[n], rtol=0.05) for n in plain if n.startswith("actor"))


@pytest.mark.parametrize("micro", [1, 10**6])
def test_both_masks_are_the_papers_in_a_language_model(micro, tmp_path):
    """Every log-probability and entropy from the model's logits, row by row in float64; one gradient, one loss."""
    tokens, traj, advantage = experience()
    share, delta, temperature = 0.6, log(1.2), 0.8
    who = learner("dapo", micro=micro, tmp_path=tmp_path, beta=0.0, entropy_coef=0.0, top_entropy=share,
                  off_policy_threshold=delta)  # fmt: skip
    model = who.policy.model.double()
    with torch.no_grad():  # some responses are far from their sampler, some near
        logp = who.policy.logp(tokens, temperature=temperature).logp
    apart = torch.tensor([0.3, 0.25, 0.1, 0.4, 0.15, 0.0])[:, None]
    traj = replace(traj, logp_old=logp.float() + apart, logp_ref=None, value=None)
    adv = torch.tensor([1.0, -1.0, -0.5, -2.0, 0.7, 0.0])[:, None].expand(traj.mask.shape)
    got = gradients(who, tokens, traj, advantage._replace(adv=adv))

    found = []  # (entropy, loss) of each step that counts
    for row in range(len(tokens)):
        start, length = int(tokens.prompt_length[row]), int(tokens.response_length[row])
        ids = torch.cat([tokens.prompt[row, :start], tokens.response[row, :length]])
        logits = model(ids[None]).logits[0] / temperature
        taken = [t for t in range(length) if tokens.mask[row, t]]
        now = [logits[start + t - 1].log_softmax(-1) for t in taken]
        own = [x[ids[start + t]] for x, t in zip(now, taken, strict=True)]
        old = [traj.logp_old[row, t].double() for t in taken]
        away = sum(float(b - a.detach()) for a, b in zip(own, old, strict=True)) / max(len(taken), 1)
        for all_, one, before, t in zip(now, own, old, taken, strict=True):
            ratio, a = (one - before).exp(), float(adv[row, t])
            loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
            found.append((-float((all_.exp() * all_).sum().detach()), 0.0 * loss if a < 0 and away > delta else loss))
    tau = sorted((h for h, _ in found), reverse=True)[ceil(share * len(found)) - 1]
    kept = [loss for h, loss in found if h >= tau]
    assert 0 < sum(float(loss.detach()) == 0 for loss in kept) < len(kept) == ceil(share * len(found))
    total = torch.stack(kept).sum() / len(kept)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(total, parameters)
    scale = max(float(x.abs().max()) for x in expected)
    for name, gradient in zip(names, expected, strict=True):
        near = got[next(n for n in got if n.startswith("actor.") and n.endswith(name))]
        torch.testing.assert_close(near, gradient, rtol=1e-4, atol=1e-5 * scale)


def test_the_logged_loss_does_not_depend_on_micro_batches_without_a_taught_step(tmp_path):
    tokens, traj, advantage = experience()
    told = []
    for micro in (10**6, 1):
        who = learner("grpo", micro=micro, tmp_path=tmp_path, top_entropy=0.05, off_policy_threshold=0.02)
        told.append(who.update(tokens, traj, advantage, Coefficients(), torch.Generator().manual_seed(0)))
    for name in ("loss/policy", "off_policy_fraction", "clip_fraction"):
        assert told[0][name] == pytest.approx(told[1][name], rel=1e-4), name
    assert 0 < told[0]["off_policy_fraction"] < 1


def test_a_trust_region_step_is_of_the_taught_steps(tmp_path):
    given = experience(seed=2)
    moved = []
    for settings in ({}, {"top_entropy": 0.3}, {"top_entropy": 0.3, "micro": 20}):
        own = {"tmp_path": tmp_path, "kl_estimator": "k2", "max_kl": 0.01, "epochs": 1, "cg_steps": 4}
        who = learner("trpo", **own, **settings)
        assert 0 < who.update(*given, Coefficients(0.3), torch.Generator().manual_seed(0))["trpo/kl"] <= 0.01
        moved.append(torch.cat([p.detach().flatten() for p in who.policy.parameters()]))
    torch.testing.assert_close(moved[1], moved[2], rtol=1e-3, atol=2e-4)
    assert float((moved[0] - moved[1]).abs().max()) > 1e-3


def test_the_critic_s_warm_up_reads_no_entropy(tmp_path, monkeypatch):
    who = learner(tmp_path=tmp_path, top_entropy=0.2)
    monkeypatch.setattr(type(who), "read_entropy", lambda *_: pytest.fail("nothing asks for it"))
    who.update(*experience(), Coefficients(), torch.Generator().manual_seed(0), only_critic=True)


@pytest.mark.parametrize("name", ["grpo", "ppo", "vespo", "trpo", "rloo"])
def test_a_run_learns_from_the_steps_of_most_entropy(name, base, tmp_path, mini):
    rl.run(recipe(name, merge(base, {"algorithm.top_entropy": 0.2})))
    assert all(row["grad_norm/actor"] < 1e6 for row in rows(tmp_path / "run")[1:])
    after, before = weights(tmp_path / "run" / "model"), weights(mini)
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_one_update_per_iteration_by_the_own_sampler_leaves_nothing_out(base):
    state = on_policy("grpo", base, algorithm__off_policy_threshold=0.001)
    assert state.iteration().stats["off_policy_fraction"] == 0
    several = on_policy(
        "grpo", base, algorithm__off_policy_threshold=1e-4, algorithm__epochs=4, optimizer__lr=0.01,
        algorithm__clip_low=0.99, algorithm__clip_high=9.0,
    )  # fmt: skip
    assert several.iteration().stats["off_policy_fraction"] > 0


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("gspo", "top_entropy", 0.2), ("luspo", "top_entropy", 0.2), ("gmpo", "top_entropy", 0.2),
     ("trpo", "off_policy_threshold", 0.5), ("vespo", "clip_low", 0.1)],
)  # fmt: skip
def test_what_a_method_does_not_read_is_refused(name, key, value, base):
    from steersman.config.load import load_recipe
    from steersman.verb_table import VERBS

    words = [f"--algorithm.{key}", str(value), "--model.path", "m", "--data.path", "d"]
    with pytest.raises(SteersmanError, match=rf"algorithm\.{key}: this verb does not read it"):
        load_recipe(VERBS[name].recipe_class(None, []), None, words)


@pytest.mark.parametrize("name", ["gspo", "luspo"])
def test_the_logged_clip_fraction_is_of_the_ratio_that_is_clipped(name, tmp_path):
    """Every token's ratio is out of bounds; of the responses' ratios, their means, those of two rows of six."""
    tokens, traj, advantage = experience(holes=False)
    who = learner(name, tmp_path=tmp_path, beta=0.0, kl_in="reward", entropy_coef=0.0)
    with torch.no_grad():
        logp = who.policy.logp(tokens, temperature=who.temperature).logp
    by_token = torch.where(torch.arange(9) % 2 == 0, 0.05, -0.05)  # the mean of an odd number of them is 0.05 / n
    away = torch.tensor([0.0, 0.2, 0.0, 0.0, -0.2, 0.0])
    length = traj.mask.sum(-1, keepdim=True)
    even = torch.where(length % 2 == 1, by_token - 0.05 / length.clamp(min=1), by_token)
    moved = torch.where(traj.mask, even + away[:, None], 0.0)
    old = replace(traj, logp_old=logp.float() - moved, logp_ref=None, value=None)
    stats = who.update(tokens, old, advantage, Coefficients(), torch.Generator().manual_seed(0))
    assert stats["clip_fraction"] == pytest.approx((LENGTHS[1] + LENGTHS[4]) / sum(LENGTHS))
