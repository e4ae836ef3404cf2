"""Masked statistics, KL estimators against exact sums, conjugate gradient against a direct solve."""

import itertools
import math

import pytest
import torch

from steersman.ops.conjugate_gradient import conjugate_gradient
from steersman.ops.kl import kl_estimate, kl_loss
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


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_only_k1_to_go_has_the_gradient_of_the_kl_of_whole_answers(seed):
    """Every answer of three letters of a language of four, with a table of logits for each prefix; no sampling."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(4,), (4, 4), (4, 4, 4)]
    tables = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    refs = [torch.randn(s, generator=g, dtype=torch.float64).log_softmax(-1) for s in shapes]
    answers = list(itertools.product(range(4), repeat=3))

    def along(given):
        return torch.stack([torch.stack([t[a[: i + 1]] for i, t in enumerate(given)]) for a in answers])

    logp, ref = along([t.log_softmax(-1) for t in tables]), along(refs)
    drawn = logp.sum(-1).exp()
    flat = lambda grads: torch.cat([x.flatten() for x in grads])  # noqa: E731
    exact = flat(torch.autograd.grad((drawn * (logp - ref).sum(-1)).sum(), tables, retain_graph=True))
    mask = torch.ones(64, 3, dtype=torch.bool)
    off = {}
    for name in ("k2", "k3", "k1_to_go"):
        loss = (drawn.detach()[:, None] * kl_loss(logp, ref, mask, name)).sum()
        off[name] = float((flat(torch.autograd.grad(loss, tables, retain_graph=True)) - exact).norm() / exact.norm())
    assert off["k1_to_go"] < 1e-12
    assert off["k2"] > 0.1
    assert off["k3"] > 0.1


def test_k1_to_go_steps_over_what_does_not_count():
    logp = torch.tensor([[-1.0, -2.0, math.nan, -3.0, math.inf]], requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0, 7.0, -3.25, 0.0]])
    mask = torch.tensor([[True, True, False, True, False]])
    (grad,) = torch.autograd.grad(kl_loss(logp, ref, mask, "k1_to_go").sum(), logp)
    assert grad.tolist() == [[0.5 - 1.0 + 0.25, -1.0 + 0.25, 0.0, 0.25, 0.0]]


def test_k3_under_truncation_misses_the_mass_that_was_cut_off():
    generator = torch.Generator().manual_seed(3)
    logits, ref = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    ref, allowed = ref.log_softmax(0), torch.tensor([0, 2, 3, 6])
    theta = logits[allowed].requires_grad_()
    logp, mass = theta.log_softmax(0), ref[allowed].exp().sum()
    p = logp.detach().exp()
    kl = (p * (logp.detach() - ref[allowed])).sum()  # log pi - log ref with the reference whole
    value = {k: (p * kl_estimate(logp.detach(), ref[allowed], k)).sum() for k in ("k1", "k3")}
    assert value["k1"].item() == pytest.approx(kl.item())
    assert value["k3"].item() == pytest.approx((kl - (1 - mass)).item())
    (found,) = torch.autograd.grad((p * kl_estimate(logp, ref[allowed], "k3")).sum(), theta, retain_graph=True)
    inside = ref[allowed].log_softmax(0)
    (pull,) = torch.autograd.grad(mass * (inside.exp() * (inside - logp)).sum(), theta)
    torch.testing.assert_close(found, pull)
