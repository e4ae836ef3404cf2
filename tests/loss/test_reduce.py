"""Reduction: micro-batches add up, what is masked can not leak, and each average is the one it says."""

import pytest
import torch

from steersman.loss.reduce import denominator, reduce, token_weight

g = torch.Generator().manual_seed(0)
LOSS = torch.randn(6, 5, generator=g).double()
MASK = torch.arange(5) < torch.tensor([5, 1, 3, 0, 4, 2])[:, None]
AVERAGES = ["token", "sequence", "episode"]


def whole(loss, average):
    weight = token_weight(MASK, average, constant=7.0, dtype=torch.float64)
    return reduce(loss, weight, denominator(MASK, average))


def test_each_average_by_hand():
    rows = [[LOSS[b, t].item() for t in range(5) if MASK[b, t]] for b in range(6)]
    flat = [x for row in rows for x in row]
    means = [sum(row) / len(row) for row in rows if row]
    assert whole(LOSS, "token").item() == pytest.approx(sum(flat) / len(flat))
    assert whole(LOSS, "sequence").item() == pytest.approx(sum(means) / len(means))
    assert whole(LOSS, "episode").item() == pytest.approx(sum(flat) / 7 / 6)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("split", [[1, 5], [2, 2, 2], [1, 1, 1, 1, 1, 1]])
def test_micro_batches_add_up_to_the_batch(average, split):
    total = denominator(MASK, average)
    parts = zip(LOSS.split(split), MASK.split(split), strict=True)
    added = sum(reduce(x, token_weight(m, average, 7.0, torch.float64), total) for x, m in parts)
    assert added.item() == pytest.approx(whole(LOSS, average).item(), rel=1e-14)


@pytest.mark.parametrize("average", AVERAGES)
def test_nothing_under_the_mask_moves_the_loss_or_its_gradient(average):
    poisoned = torch.where(MASK, LOSS, torch.nan).requires_grad_()
    value = whole(poisoned, average)
    assert torch.equal(value, whole(LOSS, average))
    value.backward()
    assert (poisoned.grad[~MASK] == 0).all()


def test_an_empty_batch_is_zero_and_not_nan():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for average in AVERAGES:
        assert reduce(torch.zeros(2, 3), token_weight(mask, average), denominator(mask, average)).item() == 0.0
