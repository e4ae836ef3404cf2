"""What estimators must satisfy to the last digit: their limits, and their expectations over a whole language."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.advantage.gae import gae, vtrace
from steersman.advantage.group import group_mean, leave_one_out
from steersman.advantage.returns import return_to_go, td_error
from steersman.algorithms.rloo import RLOO
from steersman.loss.correction import Correction
from steersman.ops.kl import KLEstimator, kl_estimate, kl_loss
from steersman.tabular.oracle import exact_gradient
from steersman.tabular.token_mdp import TokenMDP
from steersman.verify.curriculum import check_curriculum
from steersman.verify.gradient import arbitrary_critic, example, gap
from steersman.verify.two_turns import cut_turns_bootstrap, discount_counts_turns


@dataclass(slots=True)
class Identity:
    """A statement and the largest absolute difference between its two sides."""

    name: str
    statement: str
    deviation: float


def identities() -> list[Identity]:
    """Every identity on the small language of the gradient checks; well under a second."""
    mdp, logits = example()
    return [Identity(name, statement, check(mdp, logits)) for name, statement, check in IDENTITIES]


def gae_is_td(mdp: TokenMDP, logits: Tensor) -> float:
    traj = mdp.trajectory(logits, gamma=0.9, value=arbitrary_critic(mdp))
    return gap(gae(traj, 0.0).adv, td_error(traj))


def gae_is_monte_carlo(mdp: TokenMDP, logits: Tensor) -> float:
    traj = mdp.trajectory(logits, gamma=0.9, value=arbitrary_critic(mdp))
    assert traj.value is not None
    difference = torch.where(traj.mask, return_to_go(traj) - traj.value[:, :-1], 0.0)
    return gap(gae(traj, 1.0).adv, difference)


def vtrace_is_monte_carlo(mdp: TokenMDP, logits: Tensor) -> float:
    traj = mdp.trajectory(logits, gamma=0.9, value=arbitrary_critic(mdp))
    ret = vtrace(traj, traj.logp_old).ret
    assert ret is not None
    return gap(ret, return_to_go(traj))


def exact_critic_has_no_surprise(mdp: TokenMDP, logits: Tensor) -> float:
    """Sums over the answers through a state are expectations given that state, times how often it is passed."""
    delta = td_error(mdp.trajectory(logits))
    weight = mdp.sequence_prob(logits)[:, None] * delta
    passed = torch.zeros(len(mdp.states) + 1, dtype=torch.float64)
    passed.index_add_(0, mdp.path[:, :-1].flatten(), weight.flatten())
    return float(passed[:-1].abs().max())


def leave_one_out_is_scaled(mdp: TokenMDP, logits: Tensor) -> float:
    score = mdp.total_reward[:12]
    group = torch.arange(12) // 4
    return gap(leave_one_out(score, group), 4 / 3 * group_mean(score, group, "none"))


def optimum_has_one_return(mdp: TokenMDP, logits: Tensor) -> float:
    returns = mdp.trajectory(mdp.pi_star()).reward.sum(-1)
    return gap(returns, mdp.closed_form()[1][mdp.prompt])


def kl_estimates(mdp: TokenMDP, logits: Tensor) -> float:
    logp, exact = mdp.sequence_logp(logits), mdp.kl(logits)
    estimators: tuple[KLEstimator, ...] = ("k1", "k3")
    found = [mdp.expectation(logits, kl_estimate(logp, mdp.sequence_logp_ref, e).sum(-1)) for e in estimators]
    return max(gap(x, exact) for x in found)


def k2_gradient(mdp: TokenMDP, logits: Tensor) -> float:
    return _kl_gradient("k2", lambda logp, ref: (logp.exp() * (logp - ref)).sum())


def k1_to_go_gradient(mdp: TokenMDP, logits: Tensor) -> float:
    """Over whole answers of several steps, where k2 per token leaves out what a token leads to."""
    free = logits.detach().clone().requires_grad_()
    drawn, mask = mdp.sequence_prob(free).detach(), mdp.trajectory(free).mask
    per_step = kl_loss(mdp.sequence_logp(free), mdp.sequence_logp_ref, mask, "k1_to_go")
    (found,) = torch.autograd.grad((drawn[:, None] * per_step).sum(), free)
    (exact,) = torch.autograd.grad(mdp.kl(free), free)
    return gap(found, exact)


def k3_gradient(mdp: TokenMDP, logits: Tensor) -> float:
    return _kl_gradient("k3", lambda logp, ref: (ref.exp() * (ref - logp)).sum())


def importance_weights(mdp: TokenMDP, logits: Tensor) -> float:
    """Samples of the reference, weighed to the policy's: on one-token answers, where a token is a trajectory."""
    one = TokenMDP.random(5, 1, seed=1)
    policy = torch.linspace(-1, 1, 5, dtype=torch.float64)[None].requires_grad_()
    logp, drawn = one.sequence_logp(policy), one.sequence_prob(one.logp_ref)
    weight = Correction("decoupled").weight(logp, one.sequence_logp_ref, one.mask)
    loss = (drawn[:, None] * weight * one.total_reward[:, None] * logp).sum()
    (found,) = torch.autograd.grad(loss, policy)
    return gap(found.flatten(), exact_gradient(one, policy))


def difficulty(mdp: TokenMDP, logits: Tensor) -> float:
    """RLOO on prompts of which one is drawn six times as often as another."""
    return check_curriculum(RLOO())


def _kl_gradient(estimator: KLEstimator, divergence: Callable[[Tensor, Tensor], Tensor]) -> float:
    one = TokenMDP.random(5, 1, seed=1)
    logits = torch.linspace(-1, 1, 5, dtype=torch.float64)[None].requires_grad_()
    estimate = kl_estimate(one.sequence_logp(logits), one.sequence_logp_ref, estimator)
    (found,) = torch.autograd.grad((one.sequence_prob(logits).detach()[:, None] * estimate).sum(), logits)
    (exact,) = torch.autograd.grad(divergence(torch.log_softmax(logits, -1), one.logp_ref), logits)
    return gap(found, exact)


IDENTITIES: tuple[tuple[str, str, Callable[[TokenMDP, Tensor], float]], ...] = (
    ("GAE, lam = 0", "is the TD error", gae_is_td),
    ("GAE, lam = 1", "is the Monte-Carlo return minus V", gae_is_monte_carlo),
    ("V-trace, on-policy", "targets the Monte-Carlo return", vtrace_is_monte_carlo),
    ("exact critic", "E[delta | s] = 0 in every state", exact_critic_has_no_surprise),
    ("leave-one-out", "is G / (G - 1) times the group-mean advantage", leave_one_out_is_scaled),
    ("pi*", "gives every answer the return beta log Z: no comparison moves it", optimum_has_one_return),
    ("k1, k3", "have the expectation KL(pi || ref)", kl_estimates),
    ("k1_to_go in a loss", "has the gradient of KL(pi || ref) over whole answers", k1_to_go_gradient),
    ("k2 in a loss", "has, in each state, the gradient of KL(pi || ref)", k2_gradient),
    ("k3 in a loss", "has, in each state, the gradient of KL(ref || pi)", k3_gradient),
    ("discount per turn", "counts once a turn, over the world's answer", discount_counts_turns),
    ("turns cut off", "with an exact critic behind them are worth what whole ones are", cut_turns_bootstrap),
    ("prompts by difficulty", "weighted by 1 / (N q), give the exact gradient of all prompts alike", difficulty),
    ("importance weights", "uncut, give the exact gradient from another policy's samples", importance_weights),
)
