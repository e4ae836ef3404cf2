"""Masks and measures of categorical distributions against enumeration in float64."""

import math

import numpy as np
import pytest
import torch

from steersman.ops import distributions
from steersman.ops.distributions import (
    min_p_mask,
    top_k_mask,
    top_p_mask,
)


def nucleus(logits: np.ndarray, p: float, least: int = 1) -> set[int]:
    """The smallest nucleus by adding tokens one at a time, most likely first."""
    prob = np.exp(logits - logits.max())
    prob /= prob.sum()
    kept, mass = set(), 0.0
    for v in np.argsort(-prob, kind="stable"):
        if mass >= p and len(kept) >= least:
            break
        kept.add(int(v))
        mass += prob[v]
    return kept


@pytest.mark.parametrize("vocab", [7, 300, 5000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_the_smallest_set_that_reaches_p(vocab, spread, p):
    torch.manual_seed(vocab)
    logits = spread * torch.randn(2, 3, vocab, dtype=torch.float64)
    mask = top_p_mask(logits, p)
    for i in range(2):
        for j in range(3):
            assert set(mask[i, j].nonzero().flatten().tolist()) == nucleus(logits[i, j].numpy(), p)


def test_top_p_keeps_the_crossing_token_and_the_least_number():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).double().log()
    assert top_p_mask(logits, 0.6).tolist() == [True, True, False, False]
    assert top_p_mask(logits, 0.4).tolist() == [True, False, False, False]
    assert top_p_mask(logits, 0.4, min_tokens_to_keep=3).tolist() == [True, True, True, False]
    assert top_p_mask(logits, 1.0).all()
    halves = torch.tensor([0.5, 0.25, 0.25]).double().log()
    assert top_p_mask(halves, 0.5).tolist() == [True, False, False]  # that reaches 0.5 and no more is needed


def test_the_largest_min_p_keeps_the_likeliest_tokens():
    logits = torch.tensor([0.4, 0.4, 0.2]).double().log()
    assert min_p_mask(logits, 1.0).tolist() == [True, True, False]


def test_top_p_of_a_row_does_not_depend_on_the_batch(monkeypatch):
    torch.manual_seed(0)
    # one row settles in the head of the vocabulary, the other needs all of it; bfloat16 makes ties
    logits = (torch.randn(2, 6000).bfloat16() * torch.tensor([[8.0], [0.05]], dtype=torch.bfloat16)).float()
    both = top_p_mask(logits, 0.95)
    assert torch.equal(both[0], top_p_mask(logits[0], 0.95))
    assert torch.equal(both[1], top_p_mask(logits[1], 0.95))
    assert both[0].sum() < 256 < both[1].sum()
    monkeypatch.setattr(distributions, "SORTED", 6000)  # a row at a time
    flat = 0.05 * torch.randn(5, 6000)
    assert torch.equal(top_p_mask(flat, 0.95), torch.stack([top_p_mask(row, 0.95) for row in flat]))
    monkeypatch.setattr(distributions, "SORT_BELOW", 10_000)
    assert torch.equal(both.sum(-1), top_p_mask(logits, 0.95).sum(-1))


def test_top_k_keeps_exactly_k_even_with_ties():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 2.0, -torch.inf]])
    mask = top_k_mask(logits, 2)
    assert mask.sum(-1).tolist() == [2, 2]
    assert mask[1].tolist() == [False, True, True, False]
    assert top_k_mask(logits, 0).all()
    assert top_k_mask(logits, 9).all()


def test_min_p_is_relative_to_the_most_likely():
    logits = torch.tensor([0.6, 0.3, 0.07, 0.03]).double().log()
    assert min_p_mask(logits, 0.2).tolist() == [True, True, False, False]
    assert min_p_mask(logits, 0.0).all()


@pytest.mark.parametrize("call", [
    lambda x: top_k_mask(x, -1), lambda x: top_p_mask(x, 0.0), lambda x: top_p_mask(x, math.nan),
    lambda x: top_p_mask(x, 0.5, 0), lambda x: min_p_mask(x, 1.5),
])  # fmt: skip
def test_settings_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="must"):
        call(torch.zeros(4))
