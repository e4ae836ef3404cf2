"""Planning: every method agrees with the linear program, and with returns of sampled episodes."""

from __future__ import annotations

import itertools

import gymnasium
import pytest
import torch

from steersman.tabular.gym import from_gymnasium
from steersman.tabular.mdp import MDP, linear_program, policy_evaluation, policy_iteration, value_iteration
from steersman.types import SteersmanError


def random_mdp(seed=0, S=6, A=3, discount=0.9) -> MDP:
    rng = torch.Generator().manual_seed(seed)
    P = torch.softmax(2 * torch.randn(S, A, S, generator=rng, dtype=torch.float64), -1)
    return MDP(P, torch.randn(S, A, S, generator=rng, dtype=torch.float64), discount)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.95])
def test_all_methods_and_all_policies(discount):
    mdp = random_mdp(S=4, A=2, discount=discount)
    exact = linear_program(mdp)
    for solve in (value_iteration, policy_iteration):
        found = solve(mdp)
        torch.testing.assert_close(found.value, exact.value, rtol=0, atol=1e-8)
        torch.testing.assert_close(found.q, exact.q, rtol=0, atol=1e-8)
        assert torch.equal(found.policy, exact.policy)
    # the best of all 16 deterministic policies, state by state
    every = torch.stack([mdp.evaluate(torch.tensor(p)) for p in itertools.product(range(2), repeat=4)])
    torch.testing.assert_close(exact.value, every.amax(0), rtol=0, atol=1e-8)
    torch.testing.assert_close(mdp.performance(exact.policy), every.amax(0).mean(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["FrozenLake-v1", "Taxi-v4", "CliffWalking-v1"])
@pytest.mark.parametrize("discount", [0.95, 1.0])
def test_toy_text_environments(name, discount):
    mdp = from_gymnasium(name, discount)
    exact = linear_program(mdp)
    for solve in (value_iteration, policy_iteration):
        torch.testing.assert_close(solve(mdp).value, exact.value, rtol=0, atol=1e-8)
    if name == "CliffWalking-v1" and discount == 1:
        assert float(mdp.start @ exact.value) == -13
    assert mdp.terminal[-1]


def test_known_shortest_paths_in_frozen_lake():
    mdp = from_gymnasium(gymnasium.make("FrozenLake-v1", is_slippery=False), 0.9)
    assert float(mdp.start @ policy_iteration(mdp).value) == pytest.approx(0.9**5)


def test_policy_evaluation_two_ways_and_stochastic_policies():
    mdp = random_mdp()
    rng = torch.Generator().manual_seed(4)
    policy = torch.softmax(torch.randn(6, 3, generator=rng, dtype=torch.float64), -1)
    value = mdp.evaluate(policy)
    torch.testing.assert_close(policy_evaluation(mdp, policy), value, rtol=0, atol=1e-10)
    torch.testing.assert_close((policy * mdp.q(value)).sum(-1), value, rtol=0, atol=1e-12)


def test_reward_on_transitions_is_averaged():
    P = torch.tensor([[[0.25, 0.75]], [[0.0, 1.0]]])
    mdp = MDP(P, torch.tensor([[[4.0, 8.0]], [[0.0, 0.0]]]), 1.0, torch.tensor([1.0, 0.0]))
    assert float(mdp.R[0, 0]) == 7
    # 1 / 0.75 visits on average
    assert float(mdp.performance(torch.tensor([0, 0]))) == pytest.approx(7 / 0.75)
    assert mdp.terminal.tolist() == [False, True]


def test_a_loop_that_is_never_come_to_leaves_the_total_its_limit():
    """State 0 pays 1 and ends in 2; state 1, where nothing begins, pays for ever."""
    P = torch.tensor([[[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]])
    reward, policy = torch.tensor([[1.0], [1.0], [0.0]]), torch.tensor([0, 0, 0])
    assert float(MDP(P, reward, 1.0, torch.tensor([1.0, 0.0, 0.0])).performance(policy)) == 1.0
    with pytest.raises(SteersmanError, match="no limit"):
        MDP(P, reward, 1.0, torch.tensor([0.5, 0.5, 0.0])).performance(policy)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MDP(torch.ones(2, 2), torch.ones(2, 2), 0.9), "states, actions, states"),
        (lambda: MDP(torch.eye(2)[:, None], torch.ones(2, 3), 0.9), r"R must have shape \[2, 1\]"),
        (lambda: MDP(0.9 * torch.eye(2)[:, None], torch.ones(2, 1), 0.9), r"P\[0, 0\].*0\.9|0\.8999"),
        (lambda: MDP(torch.eye(2)[:, None], torch.ones(2, 1), 1.5), "discount 1.5"),
        (lambda: MDP(torch.eye(2)[:, None], torch.tensor([[0.0], [torch.nan]]), 0.9), r"R\[1, 0\]"),
        (lambda: MDP(torch.eye(2)[:, None], torch.ones(2, 1), 0.9, torch.ones(2)), "start"),
        (lambda: MDP(torch.eye(2)[:, None], torch.ones(2, 1), 0.9, torch.ones(3) / 3), r"start.*\[2\]"),
        (lambda: random_mdp().evaluate(torch.zeros(5)), r"\[6\] \(actions\)"),
        (lambda: from_gymnasium("CartPole-v1", 0.9), "no transition table"),
        # a loop that pays has no total
        (lambda: policy_iteration(MDP(torch.eye(2)[:, None], torch.ones(2, 1), 1.0)), "no limit"),
        (lambda: value_iteration(MDP(torch.eye(2)[:, None], torch.ones(2, 1), 1.0), sweeps=50), "settle"),
        (lambda: linear_program(MDP(torch.eye(2)[:, None], torch.ones(2, 1), 1.0)), "no optimum"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(SteersmanError, match=message):
        build()
