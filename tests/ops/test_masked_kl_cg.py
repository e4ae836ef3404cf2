"""Masked statistics, KL estimators against exact sums, conjugate gradient against a direct solve."""

import pytest
import torch

from steersman.ops.conjugate_gradient import conjugate_gradient
from steersman.ops.kl import kl_estimate
from steersman.ops.masked import masked_mean, masked_sum, masked_var, whiten

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
MASK = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) > 0.4


def test_masked_statistics_equal_those_of_the_kept_values_and_ignore_nan():
    kept, poisoned = X[MASK], torch.where(MASK, X, torch.nan)
    assert masked_sum(poisoned, MASK).item() == pytest.approx(kept.sum().item())
    assert masked_mean(poisoned, MASK).item() == pytest.approx(kept.mean().item())
    assert masked_var(poisoned, MASK).item() == pytest.approx(kept.var(unbiased=False).item())
    assert masked_var(poisoned, MASK, unbiased=True).item() == pytest.approx(kept.var().item())
    white = whiten(poisoned, MASK)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[MASK].var(unbiased=False).item() == pytest.approx(1, rel=1e-6)
    assert (white[~MASK] == 0).all()
    assert whiten(poisoned, MASK, shift_mean=False)[MASK].mean().item() == pytest.approx(kept.mean().item())


def test_whitening_a_constant_gives_zeros():
    assert whiten(torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool)).abs().max().item() == 0.0


def test_kl_estimators_have_the_expectations_and_gradients_that_they_document():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=g).double().requires_grad_()
    ref = torch.randn(7, generator=g).double().log_softmax(-1)
    logp = logits.log_softmax(-1)
    p = logp.detach().exp()
    exact = (p * (logp.detach() - ref)).sum()
    value = {k: (p * kl_estimate(logp.detach(), ref, k)).sum() for k in ("k1", "k2", "k3")}
    assert value["k1"].item() == pytest.approx(exact.item())
    assert value["k3"].item() == pytest.approx(exact.item())
    assert abs(value["k2"].item() - exact.item()) > 1e-3
    grad = {
        k: torch.autograd.grad((p * kl_estimate(logp, ref, k)).sum(), logits, retain_graph=True)[0]
        for k in ("k1", "k2", "k3")
    }
    reverse = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    forward = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits)[0]
    assert grad["k1"].abs().max().item() < 1e-12
    torch.testing.assert_close(grad["k2"], reverse)
    torch.testing.assert_close(grad["k3"], forward)


def test_conjugate_gradient_solves_a_positive_definite_system():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=g).double()
    A, b = root @ root.T + 0.1 * torch.eye(12).double(), torch.randn(12, generator=g).double()
    x = conjugate_gradient(lambda v: A @ v, b, steps=40, tolerance=1e-24)
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)
