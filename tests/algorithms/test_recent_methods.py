"""What the methods of 2025 and 2026 add: the best of k, filters, covariance, several rewards, lambda by length."""

from __future__ import annotations

from itertools import combinations, product
from math import comb, log
from statistics import mean, stdev

import pytest
import torch
from torch import Tensor

from steersman.advantage.best_of import best_of_k
from steersman.advantage.covariance import covariance, largest
from steersman.advantage.gae import length_adaptive
from steersman.advantage.group import best_rows, signal_weight
from steersman.algorithms import ALGORITHMS, Coefficients
from steersman.loss.policy import binary_divergence
from steersman.tabular.oracle import expected_gradient, relative_deviation
from steersman.tabular.token_mdp import TokenMDP
from steersman.types import Trajectory
from steersman.verify import gradient

F64 = torch.float64


def subsets(score: list[float], k: int) -> list[float]:
    """The definition, subset by subset: n / C(n, k) * sum over I that hold i of max_I - max_{I without i}."""
    n, out = len(score), []
    for i in range(n):
        total = 0.0
        for others in combinations([j for j in range(n) if j != i], k - 1):
            rest = [score[j] for j in others]
            total += max(score[i], *rest) - max(rest)
        out.append(n * total / comb(n, k))
    return out


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("score", [[0.3, -1.0, 2.0, 0.3, 0.9], [1.0, 0.0, 0.0, 1.0, 0.0]])
def test_best_of_k_is_its_definition_over_subsets(score, k):
    found = best_of_k(torch.tensor([*score, 7.0, 1.0, 2.0, 3.0, 4.0], dtype=F64), torch.tensor([4] * 5 + [1] * 5), k)
    assert found[:5].tolist() == pytest.approx(subsets(score, k), abs=1e-12)
    assert found[5:].tolist() == pytest.approx(subsets([7.0, 1.0, 2.0, 3.0, 4.0], k), abs=1e-12)


def best_of(mdp: TokenMDP, logits: Tensor, k: int) -> Tensor:
    """E[max of k scores] - beta KL by listing all k-tuples of answers; one prompt."""
    prob = mdp.sequence_prob(logits)
    total = torch.zeros((), dtype=F64)
    for rows in product(range(len(mdp)), repeat=k):
        total = total + prob[list(rows)].prod() * mdp.total_reward[list(rows)].max()
    return total - mdp.beta * mdp.kl(logits)


@pytest.mark.parametrize(("k", "size"), [(2, 2), (2, 3), (3, 3)])
def test_pass_at_k_has_the_exact_gradient_of_the_best_of_k(k, size):
    mdp = TokenMDP.random(2, 2, 0.3, seed=1)
    logits = torch.linspace(-1, 1, mdp.next_state.numel(), dtype=F64).reshape(mdp.next_state.shape)
    method = ALGORITHMS["pass-at-k"](k=k, beta=mdp.beta)
    found = expected_gradient(mdp, logits, gradient.batch_loss(method, mdp, logits), size=size, stacked=False)
    free = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(best_of(mdp, free, k), free)
    assert relative_deviation(found, -exact.flatten()) < 1e-10
    mean_only = torch.autograd.grad(best_of(mdp, free, 1), free)[0]
    assert relative_deviation(found, -mean_only.flatten()) > 0.05


def one_group(score: list[float], lengths: list[int], group: list[int] | None = None) -> Trajectory:
    T = max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    reward = torch.zeros(len(score), T, dtype=F64)
    reward[torch.arange(len(score)), torch.tensor(lengths) - 1] = torch.tensor(score, dtype=F64)
    return Trajectory(
        mask, reward, mask.to(F64), torch.zeros_like(reward),
        group=torch.tensor(group or [0] * len(score)), score=torch.tensor(score, dtype=F64),
    )  # fmt: skip


def test_gfpo_learns_from_the_shortest_or_the_most_efficient_half():
    score, lengths = [1.0, 0.0, 4.0, 0.5], [2, 3, 8, 1]
    traj = one_group(score, lengths)
    for by, kept in (("length", [0, 3]), ("efficiency", [0, 2])):  # scores per token: 0.5, 0, 0.5, 0.5
        adv = ALGORITHMS["gfpo"](by=by).advantage(traj).adv
        chosen = [score[i] for i in kept]
        for i in range(4):
            expected = (score[i] - mean(chosen)) / (stdev(chosen) + 1e-4) if i in kept else 0.0
            assert adv[i, : lengths[i]].tolist() == pytest.approx([expected] * lengths[i])
    assert best_rows(torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([0, 0, 0, 1]), 0.34).tolist() == [
        True, False, True, True,
    ]  # fmt: skip


def test_gpg_gives_the_weight_of_silent_groups_to_the_others():
    traj = one_group([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [1] * 6, [0, 0, 1, 1, 2, 2])
    assert signal_weight(traj) == 3.0
    assert ALGORITHMS["gpg"]().advantage(traj).adv[:, 0].tolist() == [1.5, -1.5, 0, 0, 0, 0]
    assert ALGORITHMS["gpg"](reweigh=False).advantage(traj).adv[:2, 0].tolist() == [0.5, -0.5]
    assert signal_weight(one_group([1.0, 1.0], [1, 1])) == 1.0


def test_gdpo_tells_apart_what_a_sum_of_rewards_can_not():
    """Two rewards, the second a hundred times as wide: in the sum the first is lost, apart it counts as much."""
    first, second, weights = [1.0, 0.0, 1.0, 0.0], [100.0, 0.0, 0.0, 100.0], (1.0, 0.5)
    traj = one_group([weights[0] * a + weights[1] * b for a, b in zip(first, second, strict=True)], [1] * 4)
    columns = [torch.tensor(x, dtype=F64) for x in (first, second)]
    traj.parts = torch.stack(
        [torch.stack([x, torch.full_like(x, w)], -1) for x, w in zip(columns, weights, strict=True)], 1
    )
    adv = ALGORITHMS["gdpo"](whiten=False).advantage(traj).adv[:, 0]
    expected = []
    for i in range(4):
        parts = [(x[i] - mean(x)) / (stdev(x) + 1e-4) for x in (first, second)]
        expected.append(weights[0] * parts[0] + weights[1] * parts[1])
    assert adv.tolist() == pytest.approx(expected)
    summed = ALGORITHMS["grpo"]().advantage(traj).adv[:, 0]
    assert float((summed[0] - summed[3]) / summed[0]) < 0.05 < float((adv[0] - adv[3]) / adv[0])


def test_covariance_picks_steps_where_likely_tokens_did_well():
    logp = torch.tensor([[-0.1, -3.0], [-0.2, 9.0]], dtype=F64)
    adv = torch.tensor([[2.0, 2.0], [-1.0, 9.0]], dtype=F64)
    mask = torch.tensor([[True, True], [True, False]])
    at, gain = [-0.1, -3.0, -0.2], [2.0, 2.0, -1.0]
    expected = [(a - mean(at)) * (g - mean(gain)) for a, g in zip(at, gain, strict=True)]
    found = covariance(logp, adv, mask)
    assert found[mask].tolist() == pytest.approx(expected)
    assert found[1, 1] == 0
    assert largest(found, mask, 0.34, -torch.inf, torch.inf).tolist() == [[True, False], [False, False]]
    assert not largest(found, mask, 0.34, -1.0, 0.5).any(), "one is above, the others are below"
    assert not largest(found, mask, 0.3, -torch.inf, torch.inf).any(), "less than one step"


def test_clip_cov_leaves_a_step_out_and_kl_cov_holds_it_to_the_sampler():
    traj = one_group([1.0, 0.0], [2, 2])
    traj.logp_old = torch.tensor([[-0.1, -2.0], [-2.0, -2.0]], dtype=F64)
    plain = ALGORITHMS["grpo"]().advantage(traj).adv
    clipped = ALGORITHMS["clip-cov"](cov_share=0.25, cov_low=0.1).advantage(traj).adv
    assert clipped[0, 0] == 0
    assert torch.equal(clipped.flatten()[1:], plain.flatten()[1:])
    method = ALGORITHMS["kl-cov"](cov_share=0.25, cov_coef=0.7)
    adv, logp = method.advantage(traj).adv, traj.logp_old + 0.3
    extra = method.loss(logp, traj, adv, Coefficients()) + torch.tensor(0.3).exp().double() * adv
    torch.testing.assert_close(extra, torch.tensor([[0.7 * 0.3, 0.0], [0.0, 0.0]], dtype=F64), atol=1e-6, rtol=0)


def test_lambda_grows_with_the_answer():
    mask = torch.arange(80) < torch.tensor([80, 40, 10, 0])[:, None]
    assert length_adaptive(mask, 0.05).flatten().tolist() == pytest.approx([0.75, 0.5, 0.0, 0.0])


def test_vapo_imitates_its_correct_answers():
    traj = one_group([1.0, 0.0], [2, 2])
    logp = torch.full((2, 2), -0.4, dtype=F64)
    loss = ALGORITHMS["vapo"](imitate=0.1).loss(logp, traj, torch.zeros(2, 2, dtype=F64), Coefficients())
    assert loss.flatten().tolist() == pytest.approx([0.04, 0.04, 0.0, 0.0])


def test_binary_divergences_are_of_two_outcomes():
    old, new = torch.tensor([[0.2]], dtype=F64), torch.tensor([[0.3]], dtype=F64)
    assert float(binary_divergence(new.log(), old.log(), "tv")) == pytest.approx(0.1)
    expected = 0.2 * log(0.2 / 0.3) + 0.8 * log(0.8 / 0.7)
    assert float(binary_divergence(new.log(), old.log(), "kl")) == pytest.approx(expected)
    sure = torch.zeros(1, 1)
    assert float(binary_divergence(sure, sure, "kl")) == 0
