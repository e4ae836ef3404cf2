"""Optimiser schedules and resume, KL controllers, and the trust-region step against its closed form."""

import math

import pytest
import torch
from torch import nn

from steersman.types import SteersmanError
from steersman.update.kl_controller import DoublingKL, FixedKL, ProportionalKL
from steersman.update.natural import trust_region_step
from steersman.update.optimizer import NotFiniteError, Optimizer, OptimizerConfig


def rates(config, total):
    p = nn.Parameter(torch.zeros(2, 2))
    opt = Optimizer([p], config, total)
    out = []
    for _ in range(total):
        p.grad = torch.ones_like(p)
        out.append(opt.step()["lr"])
    return out


def test_schedules():
    assert rates(OptimizerConfig(lr=1.0), 3) == [1.0] * 3
    linear = rates(OptimizerConfig(lr=1.0, schedule="linear", warmup=2, min_lr=0.1), 6)
    assert linear == pytest.approx([0.5, 1.0, 1.0, 0.775, 0.55, 0.325])
    cosine = rates(OptimizerConfig(lr=2.0, schedule="cosine"), 4)
    assert cosine == pytest.approx([1 + math.cos(math.pi * k / 4) for k in range(4)])
    assert rates(OptimizerConfig(lr=1.0, warmup=0.5), 4)[:2] == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3, 6, 7, 13, 15, 30, 72])
@pytest.mark.parametrize("warmup", [0.01, 0.1, 0.34, 0.5, 0.99, 1, 2.5, 4, 100])
def test_the_rate_is_never_above_lr_and_rises_over_whole_updates(schedule, total, warmup):
    """However few updates there are: above 0, in equal steps to lr, and at lr right after the warm-up."""
    seen = rates(OptimizerConfig(lr=1e-5, schedule=schedule, warmup=warmup), total)
    assert max(seen) <= 1e-5
    count = math.ceil(warmup if warmup >= 1 else round(warmup * total, 9))
    rise = seen[:count]
    assert rise == pytest.approx([1e-5 * (k + 1) / count for k in range(len(rise))], rel=1e-12)
    if count < total:
        assert seen[count] == 1e-5


def test_gradients_are_clipped_and_the_norm_reported_is_the_one_before():
    p = nn.Parameter(torch.zeros(3, 4))
    p.grad = torch.full((3, 4), 2.0)
    stats = Optimizer([p], OptimizerConfig(max_grad_norm=0.5), 1).step()
    assert stats["grad_norm"] == pytest.approx(48**0.5)
    assert p.grad is None


def test_a_gradient_that_is_not_finite_changes_nothing():
    p = nn.Parameter(torch.ones(2, 2))
    opt = Optimizer([p], OptimizerConfig(), 5)
    p.grad = torch.tensor([[1.0, math.nan], [0, 0]])
    with pytest.raises(NotFiniteError, match="update 0"):
        opt.step()
    assert torch.equal(p, torch.ones(2, 2))


def test_nothing_to_train_is_refused():
    with pytest.raises(SteersmanError, match="nothing to train"):
        Optimizer([nn.Parameter(torch.ones(1), requires_grad=False)], OptimizerConfig(), 1)


def test_state_resumes_bit_for_bit():
    def run(cut):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(4, 4))
        opt = Optimizer([p], OptimizerConfig(lr=0.1, schedule="cosine", warmup=2), 8)
        for k in range(8):
            if k == cut:
                state, weights = opt.state_dict(), p.detach().clone()
                p = nn.Parameter(weights)
                opt = Optimizer([p], opt.config, 8)
                opt.load_state_dict(state)
            p.grad = torch.sin(p.detach() * (k + 1))
            opt.step()
        return p.detach()

    assert torch.equal(run(None), run(4))


def test_controllers():
    fixed = FixedKL(0.1)
    fixed.update(100.0)
    assert fixed.coef == 0.1
    proportional = ProportionalKL(0.1, target=6.0, horizon=1000, samples=100)
    proportional.update(6.6)
    assert proportional.coef == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    proportional.update(1000.0)
    assert proportional.coef == pytest.approx(0.1 * 1.01 * 1.02)
    proportional.update(0.0)
    assert proportional.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)
    doubling = DoublingKL(1.0, target=0.01)
    for kl, expected in ((0.02, 2.0), (0.012, 2.0), (0.008, 2.0), (0.001, 1.0)):
        doubling.update(kl)
        assert doubling.coef == expected
    again = DoublingKL(5.0, target=0.01)
    again.load_state_dict(doubling.state_dict())
    assert again.coef == 1.0


def categorical_problem(seed=0, states=4, actions=5):
    g = torch.Generator().manual_seed(seed)
    logits = nn.Parameter(torch.randn(states, actions, generator=g).double())
    old = logits.detach().log_softmax(-1)
    adv = torch.randn(states, actions, generator=g).double()
    adv = adv - (old.exp() * adv).sum(-1, keepdim=True)

    def surrogate():
        return -(logits.log_softmax(-1).exp() * adv).sum() / states

    def kl():
        return (old.exp() * (old - logits.log_softmax(-1))).sum() / states

    return logits, surrogate, kl, old


def test_trust_region_direction_is_the_natural_gradient():
    logits, surrogate, kl, old = categorical_problem()
    before = logits.detach().clone()
    g = torch.autograd.grad(surrogate(), logits)[0].flatten()
    p = old.exp()
    fisher = torch.block_diag(*[(torch.diag(q) - torch.outer(q, q)) for q in p]) / 4 + 1e-3 * torch.eye(20).double()
    direction = torch.linalg.solve(fisher, -g)
    full = direction * (2 * 0.01 / (direction @ fisher @ direction)).sqrt()
    stats = trust_region_step([logits], [surrogate], [kl], max_kl=0.01, cg_steps=60, damping=1e-3)
    moved = (logits.detach() - before).flatten()
    torch.testing.assert_close(moved, stats["trpo/step"] * full, rtol=1e-5, atol=1e-7)
    assert 0 < stats["trpo/kl"] <= 0.01
    assert stats["trpo/improvement"] > 0


def test_trust_region_parts_add_up():
    logits, surrogate, kl, _ = categorical_problem(1)
    twin, surrogate2, kl2, _ = categorical_problem(1)
    trust_region_step([logits], [surrogate], [kl], max_kl=0.02)
    trust_region_step([twin], [lambda: surrogate2() / 2] * 2, [lambda: kl2() / 4] * 4, max_kl=0.02)
    torch.testing.assert_close(logits, twin, rtol=1e-9, atol=1e-11)


def test_trust_region_leaves_the_parameters_when_no_step_helps():
    logits, surrogate, kl, _ = categorical_problem(2)
    before = logits.detach().clone()
    worse = iter([surrogate] + [lambda: surrogate().abs() * 0 + 1e9] * 20)
    stats = trust_region_step([logits], [lambda: next(worse)()], [kl], max_kl=0.01, backtracks=3)
    assert stats["trpo/step"] == 0.0
    assert torch.equal(logits.detach(), before)
