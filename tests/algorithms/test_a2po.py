"""A*-PO: its loss in plain float64, and where it rests, by enumeration of a small language."""

from __future__ import annotations

import math

import pytest
import torch

from steersman.algorithms import ALGORITHMS, Coefficients
from steersman.algorithms.a2po import AStarPO
from steersman.control.recipe import refusal
from steersman.loss.policy import advantage_regression
from steersman.tabular.token_mdp import TokenMDP
from steersman.train.optimal_values import soft_mean
from steersman.types import SteersmanError, Trajectory
from steersman.verify import gradient

F64 = torch.float64
g = torch.Generator().manual_seed(3)
LENGTHS = [5, 2, 4, 1]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
MASK[0, 1] = False  # what an environment wrote
LOGP = torch.randn(4, 5, generator=g, dtype=F64) - 2
REF = LOGP + torch.randn(4, 5, generator=g, dtype=F64)
SCORE, VALUE = [1.0, 0.0, 0.5, -2.0], [0.3, 0.3, -0.1, 0.8]


def trajectory() -> Trajectory:
    zero = torch.zeros(4, 5, dtype=F64)
    numbers = {"score": torch.tensor(SCORE, dtype=F64), "baseline": torch.tensor(VALUE, dtype=F64)}
    return Trajectory(MASK, zero, zero + 1, LOGP, REF, **numbers)


def test_the_loss_is_the_paper_s_value_and_gradient():
    """1 / B sum_i (beta_2 log(pi(y_i) / pi_ref(y_i)) - (r_i - V*(x_i)))^2, where the mask counts."""
    beta, method, logp = 0.4, AStarPO(), LOGP.clone().requires_grad_()
    traj = trajectory()
    adv = method.advantage(traj).adv
    loss = gradient.loss_given(method, adv, logp, traj, Coefficients(beta))
    (found,) = torch.autograd.grad(loss, logp)
    total, expected = 0.0, torch.zeros_like(LOGP)
    for i in range(4):
        steps = MASK[i].nonzero().flatten().tolist()
        ratio = sum(float(LOGP[i, t] - REF[i, t]) for t in steps)
        rest = beta * ratio - (SCORE[i] - VALUE[i])
        total += rest**2 / 4
        for t in steps:
            expected[i, t] = 2 * beta * rest / 4
    assert float(loss.detach()) == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert (adv[~MASK] == 0).all()


def test_the_value_is_the_paper_s_between_the_mean_and_the_maximum():
    scores = [0.0, 1.0, 0.25, 0.0]
    for beta in (0.01, 0.5, 3.0):
        expected = beta * math.log(sum(math.exp(r / beta) for r in scores) / 4)
        assert soft_mean(scores, beta) == pytest.approx(expected, rel=1e-12)
    assert soft_mean(scores, 1e-4) == pytest.approx(1.0, abs=2e-4)
    assert soft_mean(scores, 1e6) == pytest.approx(sum(scores) / 4, abs=1e-6)
    assert soft_mean([7.0], 0.1) == pytest.approx(7.0)


def test_the_exact_value_is_a_sum_over_the_language():
    mdp, beta = TokenMDP.random(3, 2, 0.5, seed=1, prompts=2), 0.2
    prob = mdp.sequence_logp_ref.sum(-1).exp()
    for k in range(2):
        rows = (mdp.prompt == k).nonzero().flatten().tolist()
        mean = sum(float(prob[y]) * math.exp(float(mdp.total_reward[y]) / beta) for y in rows)
        assert float(mdp.soft_value(beta)[k]) == pytest.approx(beta * math.log(mean), rel=1e-12)
    torch.testing.assert_close(mdp.soft_value(0.5), mdp.closed_form()[1])


def expected_loss(mdp: TokenMDP, logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The loss with the exact V* at beta over answers that are drawn with these probabilities `[N]`."""
    adv = (mdp.total_reward - mdp.soft_value(mdp.beta)[mdp.prompt])[:, None].expand(mdp.mask.shape)
    loss = advantage_regression(mdp.sequence_logp(logits), mdp.sequence_logp_ref, adv, mdp.mask, mdp.beta)
    return (drawn * torch.where(mdp.mask, loss, 0.0).sum(-1) / mdp.length).sum()


@pytest.mark.parametrize("sampler", ["reference", "some other policy"])
def test_the_minimum_of_the_loss_is_the_regularised_optimum(sampler):
    """Whatever policy with every answer drew them: 0 at pi*, and a descent from elsewhere ends there."""
    mdp = TokenMDP.random(3, 2, 0.3, seed=6, prompts=2)
    other = torch.randn(mdp.next_state.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    drawn = mdp.sequence_prob(mdp.logp_ref if sampler == "reference" else other)
    assert float(expected_loss(mdp, mdp.pi_star(), drawn)) < 1e-25
    logits = torch.zeros(mdp.next_state.shape, dtype=F64, requires_grad=True)
    assert float(expected_loss(mdp, logits.detach(), drawn)) > 0.1
    steps = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-18,
                              line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        steps.zero_grad()
        loss = expected_loss(mdp, logits, drawn)
        loss.backward()
        return loss

    steps.step(closure)
    found = torch.log_softmax(logits.detach(), -1)
    assert gradient.gap(found.exp(), mdp.pi_star().exp()) < 1e-5
    assert float(mdp.j_star() - mdp.objective(found)) < 1e-8


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("value_beta", [0.1, 5.0])
def test_the_gradient_is_two_beta_times_the_exact_one_whatever_the_value(beta, value_beta):
    mdp = TokenMDP.random(3, 2, beta, seed=2, prompts=2, per_token=True)
    logits = torch.linspace(-1, 1, mdp.next_state.numel(), dtype=F64).reshape(mdp.next_state.shape)
    method = AStarPO(value_beta=value_beta)
    found = gradient.check_gradient(method, mdp, logits)
    assert max(found.shipped, found.core) < 1e-10
    assert method.model_copy(update={"beta": beta}).gradient_scale() == 2 * beta


def test_the_exact_value_makes_the_gradient_s_spread_vanish_at_the_optimum():
    """There every answer's own gradient is 0, not only their mean: what a baseline can do at most."""
    mdp = TokenMDP.random(3, 2, 0.3, seed=6)
    logits = mdp.pi_star().clone().requires_grad_()
    adv = (mdp.total_reward - mdp.soft_value(0.3))[:, None].expand(mdp.mask.shape)
    loss = advantage_regression(mdp.sequence_logp(logits), mdp.sequence_logp_ref, adv, mdp.mask, 0.3)
    for row in torch.where(mdp.mask, loss, 0.0).sum(-1):
        (own,) = torch.autograd.grad(row, logits, retain_graph=True)
        assert float(own.abs().max()) < 1e-12


def test_it_needs_its_values_and_a_reference():
    traj = trajectory()
    traj.baseline = None
    with pytest.raises(SteersmanError, match="optimal value"):
        AStarPO().advantage(traj)
    assert "reference" in (refusal(ALGORITHMS["a2po"]) or "")
