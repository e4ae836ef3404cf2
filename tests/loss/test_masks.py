"""Weights of whole responses and masks on the policy's loss, against the papers' formulas in plain float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steersman.algorithms import ALGORITHMS, Coefficients
from steersman.loss.masks import off_policy, top_entropy
from steersman.loss.policy import gamma_weighted
from steersman.loss.reduce import counted, denominator, reduce, token_weight
from steersman.types import Trajectory
from steersman.update.on_policy import policy_loss

F64 = torch.float64
g = torch.Generator().manual_seed(5)
LENGTHS = [6, 3, 5, 1, 2]
B, T = 5, 6
LOGP = torch.randn(B, T, generator=g, dtype=F64) * 0.4 - 2
OLD = LOGP + torch.randn(B, T, generator=g, dtype=F64) * 0.3
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
MASK[0, 2] = False  # what an environment wrote
ADV = torch.tensor([0.8, -1.1, -0.4, 0.6, -0.9], dtype=F64)[:, None].expand(B, T)
ENTROPY = torch.rand(B, T, generator=g, dtype=F64)


def steps(b: int) -> list[int]:
    return MASK[b].nonzero().flatten().tolist()


def trajectory(old: Tensor = OLD) -> Trajectory:
    return Trajectory(MASK, torch.zeros(B, T, dtype=F64), torch.ones(B, T, dtype=F64), old)


def value_and_gradient(name: str, traj: Trajectory, taught: Tensor = MASK, **settings) -> tuple[float, Tensor]:
    """Of the loss, reduced over the steps of `taught`, by what the loops call; its gradient in log pi."""
    method, logp = ALGORITHMS[name](**settings), LOGP.clone().requires_grad_()
    per_step = policy_loss(method, logp, traj, ADV, Coefficients())
    weight = token_weight(taught, method.average, dtype=F64)
    loss = reduce(per_step, weight, denominator(taught, method.average))
    return float(loss.detach()), torch.autograd.grad(loss, logp)[0]


def numeric(loss, eps: float = 1e-6) -> Tensor:
    out = torch.zeros_like(LOGP)
    for b in range(B):
        for t in range(T):
            ends = []
            for sign in (1, -1):
                moved = LOGP.clone()
                moved[b, t] += sign * eps
                ends.append(loss(moved.tolist()))
            out[b, t] = (ends[0] - ends[1]) / (2 * eps)
    return out


def test_vespo_is_its_estimator_value_and_gradient():
    """E[ W^c1 exp(c2 (1 - W)) A grad log pi(tau) ], eq. 20, over the tokens of the batch."""
    value, gradient = value_and_gradient("vespo", trajectory())
    tokens, total, expected = int(MASK.sum()), 0.0, torch.zeros_like(LOGP)
    for b in range(B):
        adv = ADV[b, 0].item()
        whole = math.prod(math.exp(LOGP[b, t].item()) / math.exp(OLD[b, t].item()) for t in steps(b))
        c1, c2 = (2.0, 3.0) if adv > 0 else (3.0, 2.0)
        phi = whole**c1 * math.exp(c2 * (1 - whole))
        assert 0.01 < phi < 1.25
        for t in steps(b):
            total -= phi * adv * LOGP[b, t].item() / tokens
            expected[b, t] = -phi * adv / tokens
    assert value == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [2.0, 3.0])
@pytest.mark.parametrize("lam", [2.0, 3.0])
def test_the_weight_is_one_on_policy_largest_at_k_over_lambda_and_never_infinite(k, lam):
    one = torch.ones(1, 1, dtype=torch.bool)

    def phi(log_weight: float, dtype: torch.dtype = F64) -> float:
        zero, at = torch.zeros(1, 1, dtype=dtype), torch.full((1, 1), log_weight, dtype=dtype)
        logp = at.clone().requires_grad_()
        loss = gamma_weighted(logp, zero, zero + 1, one, (k, lam), (1.0, 1.0))
        return -torch.autograd.grad(loss.sum(), logp)[0].item()

    assert phi(0.0) == 1.0
    top = math.log(k / lam)
    assert phi(top) == pytest.approx((k / lam) ** k * math.exp(lam - k))
    assert phi(top) > max(phi(top - 0.05), phi(top + 0.05))
    for far in (-1e4, -200.0, 200.0, 1e4):
        assert phi(far, torch.float32) == 0.0
        assert phi(far) < 1e-170


def test_luspo_is_gspo_times_the_length_value_and_gradient():
    """1 / G sum_i min(s_i A_i, clip(s_i) A_i) |y_i|, s_i the geometric mean of a response's ratios."""
    low, high = 0.05, 0.1

    def paper(logp: list[list[float]]) -> float:
        total = 0.0
        for b in range(B):
            adv, length = ADV[b, 0].item(), len(steps(b))
            s = math.exp(sum(logp[b][t] - OLD[b, t].item() for t in steps(b)) / length)
            total += min(s * adv, min(max(s, 1 - low), 1 + high) * adv) * length
        return -total / B

    value, gradient = value_and_gradient("luspo", trajectory(), clip_low=low, clip_high=high)
    assert value == pytest.approx(paper(LOGP.tolist()), rel=1e-12)
    torch.testing.assert_close(gradient, numeric(paper), rtol=1e-6, atol=1e-8)
    clipped = (gradient == 0).all(-1)
    assert clipped.any(), "one of the responses is clipped"
    assert not clipped.all()
    same = value_and_gradient("gspo", trajectory(), clip_low=low, clip_high=high, average="episode")
    assert same[0] == value
    assert torch.equal(same[1], gradient)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_top_entropy_is_the_mean_over_the_steps_above_the_threshold(share):
    """Eq. 6 of 2506.01939: both the sum and what it is divided by are of the steps with H >= tau alone."""
    taught = top_entropy(ENTROPY, MASK, share)
    ranked = sorted((ENTROPY[b, t].item() for b in range(B) for t in steps(b)), reverse=True)
    tau = ranked[math.ceil(share * len(ranked)) - 1]
    kept = [(b, t) for b in range(B) for t in steps(b) if ENTROPY[b, t].item() >= tau]
    assert 1 < len(kept) == math.ceil(share * int(MASK.sum()))

    def paper(logp: list[list[float]]) -> float:
        total = 0.0
        for b, t in kept:
            ratio, adv = math.exp(logp[b][t] - OLD[b, t].item()), ADV[b, t].item()
            total += min(ratio * adv, min(max(ratio, 0.8), 1.28) * adv)
        return -total / len(kept)

    value, gradient = value_and_gradient("dapo", trajectory(), taught)
    assert value == pytest.approx(paper(LOGP.tolist()), rel=1e-12)
    torch.testing.assert_close(gradient, numeric(paper), rtol=1e-6, atol=1e-8)


def test_the_threshold_is_of_steps_that_count_and_knows_ties():
    entropy = torch.tensor([[1.0, 2.0, 9.0], [1.0 + 1e-7, 0.5, 3.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert top_entropy(entropy, mask, 0.2).tolist() == [[False, False, False], [False, False, True]]
    assert top_entropy(entropy, mask, 0.4).tolist() == [[False, True, False], [False, False, True]]
    for order in ([0, 1], [1, 0]):  # two states of one entropy, told apart by rounding, whichever comes first
        found = top_entropy(entropy[order], mask[order], 0.6)
        assert found.tolist() == [[[True, True, False], [True, False, True]][i] for i in order]
    assert torch.equal(top_entropy(entropy, mask, 1.0), mask)
    assert top_entropy(entropy, mask, 1e-9).sum() == 1
    assert not top_entropy(entropy, torch.zeros_like(mask), 0.5).any()
    entropy[0, 2] = torch.nan  # under the mask
    assert top_entropy(entropy, mask, 0.2).sum() == 1


def test_responses_without_a_taught_step_are_no_sequences_of_the_mean():
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    assert [counted(mask, average) for average in ("token", "sequence", "episode")] == [3, 2, 3]
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert [counted(none, average) for average in ("token", "sequence", "episode")] == [0, 0, 2]
    assert denominator(none, "token") == denominator(none, "sequence") == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_off_policy_masking_is_the_report_s_value_and_gradient(recorded):
    """Eq. 9 of 2512.02556: M = 0 where A < 0 and mean_t log(pi_old / pi) > delta, by the sampler's own numbers."""
    delta = 0.1
    away = torch.tensor([0.5, 0.2, 0.05, 0.7, 0.3], dtype=F64)  # of each response, on average
    wobble = torch.where(MASK, torch.sin(torch.arange(B * T, dtype=F64).reshape(B, T)), 0.0)
    wobble = wobble - (wobble.sum(-1) / MASK.sum(-1))[:, None]
    sampled = LOGP + away[:, None] + 0.1 * wobble
    old = OLD if recorded else sampled
    traj = trajectory(torch.where(MASK, old, 70.0))
    if recorded:
        traj.logp_rollout = torch.where(MASK, sampled, 70.0)
    left_out = [b for b in range(B) if ADV[b, 0] < 0 and away[b] > delta]
    assert left_out == [1, 4]

    def paper(logp: list[list[float]]) -> float:
        total = 0.0
        for b in range(B):
            for t in steps(b):
                ratio, adv = math.exp(logp[b][t] - old[b, t].item()), ADV[b, t].item()
                kept = 0.0 if b in left_out else 1.0
                total += kept * min(ratio * adv, min(max(ratio, 0.8), 1.2) * adv) / len(steps(b)) / B
        return -total

    value, gradient = value_and_gradient("grpo", traj, off_policy_threshold=delta)
    assert value == pytest.approx(paper(LOGP.tolist()), rel=1e-12)
    torch.testing.assert_close(gradient, numeric(paper), rtol=1e-6, atol=1e-8)
    assert (gradient[left_out] == 0).all()
    assert (value_and_gradient("grpo", traj)[1][left_out] != 0).any()


def test_off_policy_masking_leaves_the_kl_term_and_the_entropy_bonus():
    traj = trajectory(LOGP + 1.0)
    traj.logp_ref = LOGP - 0.3
    method = ALGORITHMS["grpo"](off_policy_threshold=0.1, entropy_coef=0.5)
    per_step = policy_loss(method, LOGP, traj, -ADV.abs(), Coefficients(beta=0.7), entropy=ENTROPY)
    k3 = math.exp(-0.3) - 1 + 0.3
    torch.testing.assert_close(per_step[MASK], (0.7 * k3 - 0.5 * ENTROPY)[MASK])


def test_off_policy_goes_step_by_step_where_advantages_do():
    adv = torch.tensor([[1.0, -1.0, 0.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    zero = torch.zeros(1, 3)
    assert off_policy(zero, zero + 0.5, adv, mask, 0.4).tolist() == [[False, True, False]]
    assert not off_policy(zero, zero + 0.5, adv, mask, 0.5).any(), "not above it"
    assert not off_policy(zero, zero - 9.0, adv, mask, 0.4).any(), "likelier than it was"
