"""Supervised losses beside torch's own cross-entropy, and dynamic fine-tuning beside its paper."""

from __future__ import annotations

import torch

from steersman.loss.reduce import denominator, reduce, token_weight
from steersman.loss.supervised import dft, nll


def test_token_average_is_cross_entropy_over_the_answer():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11, dtype=torch.float64)
    ids, length = torch.randint(0, 11, (3, 5)), torch.tensor([5, 2, 3])
    mask = torch.arange(5) < length[:, None]
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    loss = reduce(nll(logp), token_weight(mask, "token"), denominator(mask, "token"))
    labels = torch.where(mask, ids, -100)
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 11), labels.reshape(-1))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def paper_dft(logits, ids, mask):
    """2508.05629: the sum over the answers' tokens of sg(pi) log pi, with its sign turned, over their number."""
    total, count = 0.0, 0
    for row, tokens, counts in zip(logits, ids.tolist(), mask.tolist(), strict=True):
        for z, token, counted in zip(row, tokens, counts, strict=True):
            if counted:
                p = z.exp()[token] / z.exp().sum()
                total, count = total - p.item() * p.log(), count + 1
    return total / count


def test_dft_is_the_papers_value_and_gradient():
    torch.manual_seed(1)
    logits = (2 * torch.randn(4, 6, 9, dtype=torch.float64)).requires_grad_()
    ids, length = torch.randint(0, 9, (4, 6)), torch.tensor([6, 1, 4, 3])
    mask = torch.arange(6) < length[:, None]
    mask[0, 2] = False
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    found = reduce(dft(logp), token_weight(mask, "token", dtype=torch.float64), denominator(mask, "token"))
    expected = paper_dft(logits, ids, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (got,), (want,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    (slope,) = torch.autograd.grad(-(logp.exp() * mask).sum() / mask.sum(), logits)  # of the mean probability
    torch.testing.assert_close(got, slope, rtol=1e-10, atol=1e-14)


def test_dft_is_finite_at_both_ends():
    logp = torch.tensor([[0.0, -1e-12, -80.0, -1e4, -3e38]], requires_grad=True)
    loss = dft(logp)
    (slope,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.isfinite().all()
    torch.testing.assert_close(slope, torch.tensor([[-1.0, -1.0, 0.0, 0.0, 0.0]]), rtol=0, atol=1e-12)
