"""Stale samples on the exact oracle: each correction's bias and spread, beside a listing written out by hand."""

from __future__ import annotations

import pytest
import torch

from steersman.loss.correction import Correction
from steersman.tabular.oracle import exact_gradient
from steersman.verify import staleness


def test_every_claim_holds():
    for statement, holds in staleness.claims(staleness.stale_table()):
        assert holds, statement


def test_a_broken_weight_is_caught(monkeypatch):
    true = Correction.weight

    def inverted(self, logp_old, logp_rollout, mask):
        return true(self, logp_rollout, logp_old, mask)

    monkeypatch.setattr(Correction, "weight", inverted)
    wrong = [statement for statement, holds in staleness.claims(staleness.stale_table()) if not holds]
    assert "the uncut product over the answer is exact at any lag" in wrong


@pytest.mark.parametrize("kind", ["none", "decoupled", "sequence_truncated"])
def test_bias_is_the_one_listed_answer_by_answer(kind):
    """sum_y mu(y) sum_t w_t (r(y) - J) grad log pi(y_t), the gradient of a softmax written out."""
    mdp = staleness.example()
    versions = staleness.climb(mdp, 0.7)
    policy, old = versions[-1], versions[-5]
    pi, mu = policy.softmax(-1), old.softmax(-1)
    worth = float(mdp.expected_reward(policy))
    total = torch.zeros_like(policy)
    for n in range(len(mdp)):
        steps = [(int(mdp.path[n, t]), int(mdp.sequences[n, t])) for t in range(int(mdp.length[n]))]
        ratios = [float(pi[s, a] / mu[s, a]) for s, a in steps]
        drawn = 1.0
        for s, a in steps:
            drawn *= float(mu[s, a])
        for (s, a), ratio in zip(steps, ratios, strict=True):
            whole = float(torch.tensor(ratios, dtype=torch.float64).prod())
            weight = {"none": 1.0, "decoupled": ratio, "sequence_truncated": min(whole, 2.0)}[kind]
            score = -pi[s].clone()
            score[a] += 1
            total[s] += drawn * weight * (float(mdp.total_reward[n]) - worth) * score
    exact = exact_gradient(mdp, policy)
    expected = float((total.flatten() - exact).norm() / exact.norm())
    assert staleness.measure(mdp, policy, old, Correction(kind))[0] == pytest.approx(expected, rel=1e-9)


def test_a_mixed_answer_begins_with_the_old_version():
    mdp = staleness.example()
    old, new = torch.zeros_like(mdp.logp_ref), torch.ones_like(mdp.logp_ref)
    made = staleness.mixture(mdp, old, new)
    assert (made[0] == 0).all()
    assert (made[1:] == 1).all()
