"""Reward-model losses beside transcriptions of their formulas, pair by pair and item by item."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from steersman.loss import reward


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pairwise_is_bradley_terry():
    w, l = scores(6), scores(6, seed=1)  # noqa: E741
    expected = [-math.log(sigma(a - b)) for a, b in zip(w.tolist(), l.tolist(), strict=True)]
    torch.testing.assert_close(reward.pairwise(w, l), torch.tensor(expected, dtype=torch.float64))


def test_pairwise_soft_label_and_margin():
    w, l = scores(6), scores(6, seed=1)  # noqa: E741
    p, m = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    expected = [
        -q * math.log(sigma(a - b - c)) - (1 - q) * math.log(sigma(b - a - c))
        for a, b, q, c in zip(w.tolist(), l.tolist(), p.tolist(), m.tolist(), strict=True)
    ]
    loss = reward.pairwise(w, l, target=p, margin=m)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(loss, reward.pairwise(l, w, target=1 - p, margin=m))  # which one is named first
    torch.testing.assert_close(reward.pairwise(w, l, target=1.0, margin=m), -torch.log(torch.sigmoid(w - l - m)))


def test_pairwise_is_least_where_the_score_difference_is_the_log_odds():
    lead = torch.tensor([math.log(0.7 / 0.3)], dtype=torch.float64, requires_grad=True)
    reward.pairwise(lead, torch.zeros_like(lead), target=0.7).sum().backward()
    assert abs(lead.grad.item()) < 1e-12


def test_pairwise_survives_extreme_scores():
    w = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = reward.pairwise(w, -w, target=0.9)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert w.grad.isfinite().all()


def ranking_by_pairs(score, rank, mask, tie_weight):
    rows = []
    for s, k, m in zip(score.tolist(), rank.tolist(), mask.tolist(), strict=True):
        total = count = 0.0
        for i, j in itertools.combinations([i for i in range(len(s)) if m[i]], 2):
            if k[i] == k[j]:
                total += tie_weight * (-0.5 * math.log(sigma(s[i] - s[j])) - 0.5 * math.log(sigma(s[j] - s[i])))
                count += tie_weight
            else:
                best, worst = (i, j) if k[i] < k[j] else (j, i)
                total -= math.log(sigma(s[best] - s[worst]))
                count += 1
        rows.append(total / count if count else 0.0)
    return torch.tensor(rows, dtype=torch.float64)


RANK = torch.tensor([[2, 0, 1, 3], [0, 1, 1, 0], [5, 2, 0, 9], [1, 1, 0, 0], [0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("tie_weight", [1.0, 0.25, 0.0])
def test_ranking_is_its_pairs_one_by_one(tie_weight):
    score = scores(5, 4)
    expected = ranking_by_pairs(score, RANK, MASK, tie_weight)
    torch.testing.assert_close(reward.ranking(score, RANK, MASK, tie_weight=tie_weight), expected)


def test_ranking_gradient_is_that_of_its_pairs():
    score = scores(1, 5).requires_grad_()
    rank, mask = torch.tensor([[3, 0, 4, 1, 2]]), torch.ones(1, 5, dtype=torch.bool)
    (whole,) = torch.autograd.grad(reward.ranking(score, rank, mask).sum(), score)
    order = rank[0].argsort()
    one_by_one = [
        reward.pairwise(score[0, order[i]], score[0, order[j]]) for i, j in itertools.combinations(range(5), 2)
    ]
    (pairs,) = torch.autograd.grad(torch.stack(one_by_one).mean(), score)
    torch.testing.assert_close(whole, pairs)


def luce(score: list[float], order: list[int]) -> float:
    """-log of the product of the shares of what is still standing."""
    loss = 0.0
    for i, best in enumerate(order):
        loss -= math.log(math.exp(score[best]) / sum(math.exp(score[j]) for j in order[i:]))
    return loss


def test_plackett_luce_is_a_product_of_draws():
    score, rank = scores(1, 4), torch.tensor([[2, 0, 3, 1]])
    loss = reward.plackett_luce(score, rank, torch.ones(1, 4, dtype=torch.bool))
    assert loss.item() == pytest.approx(luce(score[0].tolist(), [1, 3, 0, 2]))


def test_plackett_luce_of_all_orders_adds_up_to_one():
    score, mask = scores(1, 4, seed=3), torch.ones(1, 4, dtype=torch.bool)
    ranks = torch.tensor(list(itertools.permutations(range(4))))
    loss = reward.plackett_luce(score.expand(24, 4), ranks, mask.expand(24, 4))
    assert (-loss).exp().sum().item() == pytest.approx(1)


def test_plackett_luce_of_two_is_bradley_terry_and_masks_shorten():
    score = scores(3, 4)
    mask = torch.tensor([[True, True, False, False]] * 3)
    rank = torch.tensor([[0, 1, 0, 0]] * 3)
    torch.testing.assert_close(reward.plackett_luce(score, rank, mask), reward.pairwise(score[:, 0], score[:, 1]))


def test_plackett_luce_tie_prefers_neither():
    score = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    reward.plackett_luce(score, torch.tensor([[0, 0, 1]]), torch.ones(1, 3, dtype=torch.bool)).sum().backward()
    assert score.grad[0, 0] == score.grad[0, 1] < 0 < score.grad[0, 2]


@pytest.mark.parametrize("loss", [reward.ranking, reward.plackett_luce])
def test_rankings_ignore_what_is_masked_and_survive_extremes(loss):
    score = scores(5, 4).float().requires_grad_()
    dirty = torch.where(MASK, score, torch.nan)
    clean_loss, dirty_loss = loss(score, RANK, MASK), loss(dirty, torch.where(MASK, RANK, -7), MASK)
    torch.testing.assert_close(clean_loss, dirty_loss)
    (grad,) = torch.autograd.grad(dirty_loss.sum(), score)
    assert (grad[~MASK] == 0).all()
    assert grad.isfinite().all()
    wild = torch.tensor([[1e4, -1e4, 0.0, 3e4]], requires_grad=True)
    wild_loss = loss(wild, torch.tensor([[3, 1, 2, 0]]), torch.ones(1, 4, dtype=torch.bool))
    (grad,) = torch.autograd.grad(wild_loss.sum(), wild)
    assert wild_loss.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("loss", [reward.ranking, reward.plackett_luce])
def test_rankings_pass_gradcheck(loss):
    rows = slice(0, 3)
    assert torch.autograd.gradcheck(lambda s: loss(s, RANK[rows], MASK[rows]), scores(3, 4).requires_grad_())


def test_regressions():
    score, rating = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 2.0, 0.0])
    assert reward.huber(score, rating, delta=1.0).tolist() == [0.5, 3.5, 0.125]
    assert reward.huber(score, rating, delta=2.0).tolist() == [0.5, 6.0, 0.125]


def test_multi_objective_counts_only_what_was_rated():
    score = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], requires_grad=True)
    rating = torch.tensor([[0.0, torch.nan, 1.0], [torch.nan] * 3, [0.0, 3.0, 1.0]])
    present = ~rating.isnan()
    loss = reward.multi_objective(score, rating, present)
    torch.testing.assert_close(loss, torch.tensor([2.5, 0.0, 5 / 3]))
    loss.sum().backward()
    assert score.grad.isfinite().all()
    assert (score.grad[~present] == 0).all()
    weighted = reward.multi_objective(score, rating, present, weight=torch.tensor([3.0, 1.0, 1.0]))
    torch.testing.assert_close(weighted, torch.tensor([7 / 4, 0.0, 7 / 5]))


def test_centring_fixes_the_level_and_nothing_else():
    w, l = scores(4), scores(4, seed=1)  # noqa: E741
    torch.testing.assert_close(reward.centring(w, l), (w + l).square())
    torch.testing.assert_close(reward.pairwise(w + 3, l + 3), reward.pairwise(w, l))
    assert (reward.centring(w + 3, l + 3) != reward.centring(w, l)).all()


def test_process_is_cross_entropy_at_step_ends():
    logit = torch.tensor([[0.3, -1.0, 9.0, torch.nan]], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([[1.0, 0.25, 0.0, torch.nan]], dtype=torch.float64)
    step = torch.tensor([[True, True, False, False]])
    loss = reward.process(logit, label, step)
    first = -math.log(sigma(0.3))
    second = -0.25 * math.log(sigma(-1.0)) - 0.75 * math.log(1 - sigma(-1.0))
    torch.testing.assert_close(loss, torch.tensor([[first, second, 0.0, 0.0]], dtype=torch.float64))
    loss.sum().backward()
    assert logit.grad[0, 2:].tolist() == [0.0, 0.0]
