"""Tabular learners reach the optimum that planning knows, each at its own fixed point."""

from __future__ import annotations

import gymnasium
import pytest
import torch

from steersman.tabular.gym import from_gymnasium
from steersman.tabular.learning import Discrete, MDPSampler, _worth, constant, learn, linear, power
from steersman.tabular.mdp import MDP, policy_iteration
from steersman.types import SteersmanError


def small_mdp(discount=0.8) -> MDP:
    """Four states that mix well, with an end that is reached now and then."""
    rng = torch.Generator().manual_seed(0)
    P = torch.zeros(5, 2, 5).double()
    P[:4, :, :4] = 0.9 * torch.softmax(torch.randn(4, 2, 4, generator=rng).double(), -1)
    P[:4, :, 4], P[4, :, 4] = 0.1, 1
    R = torch.randn(5, 2, generator=rng).double()
    R[4] = 0
    start = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0])
    return MDP(P, R, discount, start)


def explorer(q: torch.Tensor, epsilon: float) -> torch.Tensor:
    best = torch.nn.functional.one_hot(q.argmax(-1), q.shape[1])
    return (1 - epsilon) * best + epsilon / q.shape[1]


def greedy_return(name: str, policy: torch.Tensor) -> float:
    env = gymnasium.make(name)
    state, _ = env.reset(seed=0)
    total, over = 0.0, False
    while not over:
        state, reward, terminated, truncated, _ = env.step(int(policy[state]))
        total, over = total + float(reward), terminated or truncated
    return total


@pytest.mark.parametrize("method", ["q-learning", "double-q"])
def test_off_policy_methods_find_q_star(method):
    mdp = small_mdp()
    out = learn(MDPSampler(mdp), method, episodes=8000, discount=0.8, alpha=power(1, 0.8), epsilon=constant(0.5))
    exact = policy_iteration(mdp)
    torch.testing.assert_close(out.q[:4], exact.q[:4], rtol=0, atol=0.06)
    assert torch.equal(out.policy[:4], exact.policy[:4])


@pytest.mark.parametrize("method", ["sarsa", "expected-sarsa"])
def test_on_policy_methods_value_their_own_exploration(method):
    mdp, epsilon = small_mdp(), 0.5
    out = learn(MDPSampler(mdp), method, episodes=8000, discount=0.8, alpha=power(1, 0.8), epsilon=constant(epsilon))
    own = mdp.q(mdp.evaluate(explorer(out.q, epsilon)))
    torch.testing.assert_close(out.q[:4], own[:4], rtol=0, atol=0.06)
    # which is not Q*: the difference is what exploring costs
    assert float((policy_iteration(mdp).q - out.q)[:4].mean()) > 0.2


def test_truncation_bootstraps_and_termination_does_not():
    # one state that pays 1 for ever, cut after three steps: worth 1 / (1 - 0.5) all the same
    loop = MDP(torch.ones(1, 1, 1), torch.ones(1, 1), 0.5)
    settings = {"discount": 0.5, "alpha": constant(0.5), "epsilon": constant(0.0)}
    cut = learn(MDPSampler(loop, horizon=3), "q-learning", episodes=100, **settings)
    assert float(cut.q) == pytest.approx(2)
    assert (cut.lengths == 3).all()
    # the same reward with an end after one step is worth 1, whatever stands in the end state's row
    end = MDP(torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]]), torch.tensor([[1.0], [0.0]]), 0.5, torch.tensor([1.0, 0.0]))
    done = learn(MDPSampler(end), "q-learning", episodes=100, initial=7.0, **settings)
    assert float(done.q[0]) == pytest.approx(1)


def test_targets_by_hand():
    from random import Random

    rng, own, other = Random(0), [1.0, 3.0], [10.0, 20.0]
    assert _worth("q-learning", own, other, 0, 0.2, rng) == 3
    assert _worth("sarsa", own, other, 0, 0.2, rng) == 1
    assert _worth("expected-sarsa", own, other, 0, 0.2, rng) == pytest.approx(0.9 * 3 + 0.1 * 1)
    assert _worth("double-q", own, other, 0, 0.2, rng) == 20


def test_cliff_walking_optimum_and_the_safe_path():
    settings = {"episodes": 500, "discount": 1.0, "alpha": constant(0.5), "epsilon": constant(0.1), "seed": 1}
    bold = learn(gymnasium.make("CliffWalking-v1"), "q-learning", **settings)
    safe = learn(gymnasium.make("CliffWalking-v1"), "sarsa", **settings)
    assert greedy_return("CliffWalking-v1", bold.policy) == -13
    # Sutton and Barto, example 6.6: SARSA walks away from the edge and falls less while it explores
    assert float(safe.returns[100:].mean()) > float(bold.returns[100:].mean()) + 5


def test_frozen_lake_reaches_the_exact_optimum():
    mdp = from_gymnasium("FrozenLake-v1", 0.99)
    out = learn(
        MDPSampler(mdp, horizon=100),
        "q-learning",
        episodes=10_000,
        discount=0.99,
        alpha=power(1, 0.6),
        epsilon=constant(0.2),
        initial=1.0,
        seed=1,
    )
    best = mdp.start @ policy_iteration(mdp).value
    torch.testing.assert_close(mdp.performance(out.policy), best, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_taxi_reaches_the_exact_optimum():
    env = gymnasium.make("Taxi-v4")
    mdp = from_gymnasium(env, 0.99)
    out = learn(
        env,
        "q-learning",
        episodes=4000,
        discount=0.99,
        alpha=constant(1.0),
        epsilon=constant(0.3),
        initial=20.0,
        seed=1,
    )
    policy = torch.cat([out.policy, torch.zeros(1, dtype=torch.long)])
    best = mdp.start @ policy_iteration(mdp).value
    torch.testing.assert_close(mdp.performance(policy), best, rtol=0, atol=1e-9)


def test_same_seed_same_table():
    runs = [
        learn(MDPSampler(small_mdp()), "double-q", episodes=50, discount=0.8, alpha=constant(0.1),
              epsilon=constant(0.2), seed=seed)
        for seed in (3, 3, 4)
    ]  # fmt: skip
    assert torch.equal(runs[0].q, runs[1].q)
    assert torch.equal(runs[0].returns, runs[1].returns)
    assert not torch.equal(runs[0].q, runs[2].q)


def test_schedules():
    assert [linear(1, 0.2, 4)(n) for n in (0, 2, 4, 9)] == pytest.approx([1, 0.6, 0.2, 0.2])
    assert [power(1)(n) for n in (0, 1, 3)] == pytest.approx([1, 1 / 2, 1 / 4])
    assert constant(0.3)(7) == 0.3


@pytest.mark.parametrize(("name", "space"), [("CartPole-v1", "observation"), ("Pendulum-v1", "observation")])
def test_continuous_spaces_are_refused_by_name(name, space):
    settings = {"episodes": 1, "discount": 0.9, "alpha": constant(0.1), "epsilon": constant(0.1)}
    with pytest.raises(SteersmanError, match=rf"discrete {space} space.*Box"):
        learn(gymnasium.make(name), "q-learning", **settings)


def test_other_refusals():
    env = MDPSampler(small_mdp())
    settings = {"episodes": 1, "discount": 0.9, "alpha": constant(0.1), "epsilon": constant(0.1)}
    with pytest.raises(SteersmanError, match=r"unknown method 'dqn': choose one of q-learning, sarsa"):
        learn(env, "dqn", **settings)
    with pytest.raises(SteersmanError, match=r"discount 1\.2"):
        learn(env, "sarsa", **{**settings, "discount": 1.2})
    env.action_space = Discrete(2, start=1)
    with pytest.raises(SteersmanError, match="count from 0"):
        learn(env, "sarsa", **settings)
