import math

import pytest
import torch

from steersman.reward import shaping

T = torch.tensor


def oracle(scores, logp, ref, mask, beta, estimator, per_token):
    """Token by token in Python floats."""
    out = []
    for b, row in enumerate(mask.tolist()):
        steps = [t for t, counts in enumerate(row) if counts]
        rewards = [0.0] * len(row)
        for t in steps:
            d = float(logp[b, t]) - float(ref[b, t])
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
            rewards[t] = -beta * kl + (float(per_token[b, t]) if per_token is not None else 0.0)
        if steps:
            given = sum(float(per_token[b, t]) for t in steps) if per_token is not None else 0.0
            rewards[steps[-1]] += float(scores[b]) - given
        out.append(rewards)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("by_token", [False, True])
def test_kl_shaped_equals_the_loop(estimator, by_token):
    torch.manual_seed(0)
    logp, ref, per_token = (torch.randn(5, 7, dtype=torch.float64) for _ in range(3))
    scores = torch.randn(5, dtype=torch.float64)
    mask = torch.arange(7) < T([7, 4, 1, 0, 6])[:, None]
    mask[4, 2:4] = False  # a user's turn between two of the assistant's
    per_token = per_token if by_token else None
    got = shaping.kl_shaped(scores, logp, ref, mask, 0.3, estimator, per_token)
    torch.testing.assert_close(got, oracle(scores, logp, ref, mask, 0.3, estimator, per_token))


def test_rows_sum_to_score_minus_kl_and_nothing_leaks_from_the_mask():
    torch.manual_seed(1)
    logp, ref, scores = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3)
    mask = torch.arange(5) < T([5, 3, 2])[:, None]
    poisoned = torch.where(mask, logp, torch.nan), torch.where(mask, ref, torch.inf)
    got = shaping.kl_shaped(scores, *poisoned, mask, 0.1)
    assert torch.equal(got, shaping.kl_shaped(scores, logp, ref, mask, 0.1))
    assert (got[~mask] == 0).all()
    kl = torch.where(mask, logp - ref, 0.0).sum(1)
    torch.testing.assert_close(got.sum(1), scores - 0.1 * kl)


def test_missing_eos_costs_only_what_was_cut():
    assert shaping.missing_eos_penalty(T([1.0, 1.0]), T([True, False]), 0.5).tolist() == [1.0, 0.5]


def test_overlong_penalty_is_dapos_three_pieces():
    length = T([1, 80, 90, 95, 100, 130])
    assert shaping.overlong_penalty(length, 100, 20).tolist() == pytest.approx([0, 0, -0.5, -0.75, -1, -1])


def test_running_norm_equals_the_whole_and_resumes():
    torch.manual_seed(2)
    batches = [torch.randn(n) * 3 + 1e4 for n in (1, 7, 64, 2)]
    norm, resumed = shaping.RunningNorm(), shaping.RunningNorm()
    for i, batch in enumerate(batches):
        norm.update(batch)
        if i == 1:
            resumed.load_state_dict(norm.state_dict())
        if i > 1:
            resumed.update(batch)
    whole = torch.cat(batches).double()
    assert norm.mean == pytest.approx(float(whole.mean()), rel=1e-12)
    assert norm.std == pytest.approx(float(whole.std(correction=0)), rel=1e-9)
    assert resumed.state_dict() == norm.state_dict()
    x = T([1e4, 2e4])
    torch.testing.assert_close(norm.normalise(x), ((x.double() - norm.mean) / norm.std).float())
    torch.testing.assert_close(norm.normalise(x, shift=False), (x.double() / norm.std).float())


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_a_constant_reward_becomes_zero_and_is_named(value):
    scores, norm = torch.full((8,), value), shaping.RunningNorm()
    assert norm.normalise(scores).isfinite().all()
    for _ in range(3):
        norm.update(scores)
    assert norm.normalise(scores).abs().max() < 1e-3
    assert "all 8 rewards" in (shaping.constant_note(scores) or "")
    assert shaping.constant_note(scores + torch.arange(8) * 1.0) is None
    assert shaping.constant_note(scores[:1]) is None
