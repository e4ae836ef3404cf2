"""Learning action values from experience: Q-learning, SARSA, expected SARSA, double Q-learning.

    Q(s, a) <- Q(s, a) + alpha (r + discount target - Q(s, a))

The methods differ in the target; a terminated step has target 0, a truncated one does not.
Source: Sutton and Barto, "Reinforcement Learning", 2nd ed., sections 6.4 to 6.7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steersman.tabular.mdp import MDP
from steersman.types import SteersmanError

Method = Literal["q-learning", "sarsa", "expected-sarsa", "double-q"]
Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """Always the same."""
    return lambda _: value


def linear(first: float, last: float, steps: int) -> Schedule:
    """From `first` to `last` over `steps`, then `last`."""
    return lambda n: last + (first - last) * max(0.0, 1 - n / steps)


def power(first: float, exponent: float = 1.0, scale: float = 1.0) -> Schedule:
    """first / (1 + n / scale)^exponent. As a step size it converges for an exponent in (1/2, 1]."""
    return lambda n: first / (1 + n / scale) ** exponent


@dataclass(frozen=True, slots=True)
class Discrete:
    """A set of n things, 0 to n - 1."""

    n: int
    start: int = 0


class MDPSampler:
    """Draws episodes from an MDP, with the interface of a Gymnasium environment.

    An episode terminates on entering a terminal state and is truncated after `horizon` steps.
    """

    def __init__(self, mdp: MDP, horizon: int = 1000):
        self.observation_space, self.action_space = Discrete(mdp.states), Discrete(mdp.actions)
        self.horizon = horizon
        self._outcomes = [[_cumulative(row) for row in rows] for rows in mdp.P]
        self._start, self._reward = _cumulative(mdp.start), mdp.R.tolist()
        self._terminal = mdp.terminal.tolist()
        self._rng = Random(0)

    def reset(self, *, seed: int | None = None) -> tuple[int, dict[str, Any]]:
        if seed is not None:
            self._rng = Random(seed)
        self._state, self._steps = self._draw(self._start), 0
        return self._state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        reward = self._reward[self._state][action]
        self._state, self._steps = self._draw(self._outcomes[self._state][action]), self._steps + 1
        end = self._terminal[self._state]
        return self._state, reward, end, not end and self._steps >= self.horizon, {}

    def _draw(self, outcomes: tuple[list[int], list[float]]) -> int:
        states, cumulative = outcomes
        return self._rng.choices(states, cum_weights=cumulative)[0]


def _cumulative(row: Tensor) -> tuple[list[int], list[float]]:
    """The states of positive probability, and their cumulative probabilities."""
    possible = torch.nonzero(row).flatten()
    return possible.tolist(), row[possible].cumsum(0).tolist()


@dataclass(slots=True)
class Learned:
    """Action values `q` [S, A], their greedy `policy` [S], undiscounted `returns` and `lengths` per episode."""

    q: Float[Tensor, "S A"]
    policy: Int[Tensor, " S"]
    returns: Float[Tensor, " E"]
    lengths: Int[Tensor, " E"]


def _size(space: Any, what: str) -> int:
    kind = type(space).__name__
    if kind != "Discrete":
        instead = (
            "use a method with a function approximator, such as PPO"
            if kind == "Box"
            else f"wrap the environment in a class of yours in which each {what} is one number"
        )
        raise SteersmanError(
            f"tabular learning needs a discrete {what} space, this environment has {space}; {instead}"
        )
    if int(space.start) != 0:
        raise SteersmanError(f"the {what} space must count from 0, this one starts at {space.start}")
    return int(space.n)


def _greedy(row: list[float], rng: Random) -> int:
    best = max(row)
    if row.count(best) == 1:
        return row.index(best)
    # ties are drawn, else an untouched table would always try action 0
    return rng.choice([a for a, value in enumerate(row) if value == best])


def _choose(row: list[float], epsilon: float, rng: Random) -> int:
    return rng.randrange(len(row)) if rng.random() < epsilon else _greedy(row, rng)


def _worth(
    method: Method, own: list[float], other: list[float], following: int, epsilon: float, rng: Random
) -> float:
    """What the state reached is taken to be worth, from its row of action values."""
    if method == "sarsa":
        return own[following]
    if method == "expected-sarsa":
        return (1 - epsilon) * max(own) + epsilon * sum(own) / len(own)
    if method == "double-q":
        return other[_greedy(own, rng)]
    return max(own)


def learn(
    env: Any,
    method: Method,
    *,
    episodes: int,
    discount: float,
    alpha: Schedule,
    epsilon: Schedule,
    seed: int = 0,
    initial: float = 0.0,
    check: Callable[[], None] = lambda: None,
) -> Learned:
    """Learn Q on an environment with discrete states and actions, exploring epsilon-greedily.

    `env` is a Gymnasium environment or an `MDPSampler`. `alpha` is asked with the number of earlier updates of
    the entry at hand, `epsilon` with the number of earlier episodes. `initial` fills the table; above the
    largest return it makes every action be tried. `check` is called after every step, and may raise.

    Targets, with s' the next state and a' the next action that the behaviour policy takes:

    - "q-learning": max_a Q(s', a).
    - "sarsa": Q(s', a'); converges to the value of the policy that explores.
    - "expected-sarsa": E_a'[Q(s', a')] under the epsilon-greedy policy.
    - "double-q": Q_2(s', argmax_a Q_1(s', a)), the roles of the two tables drawn at each step; their mean is
      acted on and returned. Source: van Hasselt, "Double Q-learning", NeurIPS 2010, algorithm 1.

    Every method chooses a' before the update, as SARSA must; the textbook's Q-learning chooses it after, which
    differs only where s' = s.

    Raises SteersmanError for spaces that are not discrete, an unknown method, a discount outside [0, 1].
    """
    S, A = _size(env.observation_space, "observation"), _size(env.action_space, "action")
    if method not in get_args(Method):
        raise SteersmanError(f"unknown method {method!r}: choose one of {', '.join(get_args(Method))}")
    if not 0 <= discount <= 1:
        raise SteersmanError(f"discount {discount} is outside [0, 1]")
    rng, tables = Random(seed), 2 if method == "double-q" else 1
    # plain lists: arrays of four numbers cost more to touch than to compute with
    q = [[[float(initial)] * A for _ in range(S)] for _ in range(tables)]
    visits = [[[0] * A for _ in range(S)] for _ in range(tables)]
    acting = q[0] if tables == 1 else [row.copy() for row in q[0]]
    returns, lengths = [0.0] * episodes, [0] * episodes
    env.reset(seed=seed)

    for episode in range(episodes):
        eps, over = epsilon(episode), False
        state = int(env.reset()[0])
        action = _choose(acting[state], eps, rng)
        while not over:
            after, reward, terminated, truncated, _ = env.step(action)
            following = _choose(acting[after], eps, rng)
            i = rng.randrange(2) if tables == 2 else 0
            worth = 0.0
            if not terminated:
                worth = _worth(method, q[i][after], q[i - 1][after], following, eps, rng)
            row = q[i][state]
            row[action] += alpha(visits[i][state][action]) * (reward + discount * worth - row[action])
            visits[i][state][action] += 1
            if tables == 2:
                acting[state][action] = (row[action] + q[i - 1][state][action]) / 2
            returns[episode] += reward
            lengths[episode] += 1
            state, action, over = int(after), following, terminated or truncated
            check()

    final = torch.tensor(acting, dtype=torch.float64)
    return Learned(final, final.argmax(-1), torch.tensor(returns, dtype=torch.float64), torch.tensor(lengths))
