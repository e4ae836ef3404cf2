"""Invariant 9: trained on samples, a method reaches the known optimum, or the place where it says it rests."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from steersman.algorithms import ALGORITHMS
from steersman.tabular.token_mdp import TokenMDP
from steersman.verify import gradient, training
from steersman.verify.judge import REACHED

BUDGET = training.Budget()  # what `steersman verify` gives them


@pytest.mark.parametrize(("name", "iterations"), [("rloo", 80), ("dr-grpo", 80), ("ppo", 15)])
def test_a_short_budget_goes_most_of_the_way(name, iterations):
    mdp = TokenMDP.random(3, 2, 0.5, seed=0, prompts=2)
    way = training.way_to_optimum(ALGORITHMS[name](), mdp, 0, training.Budget(iterations=iterations))
    assert way.optimum > REACHED


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, a in ALGORITHMS.items() if not a.fixed_point])
def test_reaches_the_optimum(name):
    way = training.way_to_optimum(ALGORITHMS[name](), training.example(), 0, BUDGET)
    assert REACHED < way.optimum < 1 + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, a in ALGORITHMS.items() if a.fixed_point])
def test_rests_elsewhere_and_reaches_the_optimum_without_its_biases(name):
    mdp = training.example()
    shipped = training.way_to_optimum(ALGORITHMS[name](), mdp, 0, BUDGET)
    core = training.way_to_optimum(gradient.unbiased(ALGORITHMS[name]()), mdp, 0, BUDGET)
    assert shipped.optimum < REACHED < core.optimum
    if name == "nlpo":
        assert shipped.allowed > 0.99


def test_the_best_policy_within_a_mask_is_found_by_hand():
    mdp = TokenMDP.random(3, 2, 0.5, seed=1, prompts=2)
    assert training.best_within(mdp, mdp.logp_ref) == pytest.approx(float(mdp.j_star()), abs=1e-12)
    logits = mdp.logp_ref.clone()
    logits[0, 1] = -math.inf  # prompt 0 may not begin with token 1
    total = 0.0
    for prompt in range(2):
        z = 0.0
        for answer in [(0,), *itertools.product((1, 2), (0, 1, 2))]:
            if prompt == 0 and answer[0] == 1:
                continue
            match = (mdp.prompt == prompt) & (mdp.length == len(answer))
            match &= (mdp.sequences[:, : len(answer)] == torch.tensor(answer)).all(1)
            n = int(match.nonzero())
            z += math.exp(float(mdp.sequence_logp_ref[n].sum() + mdp.total_reward[n] / mdp.beta))
        total += 0.5 * mdp.beta * math.log(z)
    assert training.best_within(mdp, logits) == pytest.approx(total, abs=1e-12)


def test_the_mask_is_refreshed_and_limits_what_is_sampled():
    run = training.Run(ALGORITHMS["nlpo"](mask_top_p=0.6, mask_every=3), training.example(), 0, training.Budget(4))
    before = run.forbidden.clone()
    assert before.any()
    for i in range(2):
        run.iteration(i)
    assert torch.equal(run.forbidden, before)
    run.iteration(2)
    assert not torch.equal(run.forbidden, before)
    assert run.policy()[run.forbidden].isinf().all()
