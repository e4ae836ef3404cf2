"""Finite Markov decision processes, solved by planning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, vstack
from torch import Tensor

from steersman.tabular.markov import MarkovChain, stochastic
from steersman.types import SteersmanError

Policy = Tensor
"""Actions [S], or action probabilities [S, A]."""


@dataclass(slots=True)
class Solution:
    """`value` [S], `q` [S, A], a greedy `policy` [S] for them, and how many sweeps or improvements it took."""

    value: Float[Tensor, " S"]
    q: Float[Tensor, "S A"]
    policy: Int[Tensor, " S"]
    iterations: int


class MDP:
    """States, actions, P [S, A, S], rewards R [S, A] or [S, A, S], a discount in [0, 1], start [S].

    `start` defaults to the uniform distribution. `terminal` [S] marks the states that nothing leaves and
    that pay nothing; it is read off P and R. With discount 1 the total reward must have a limit: policies that
    never end must pay nothing.

    Raises SteersmanError for shapes that do not fit, rows that are no distributions, rewards that are not
    finite, a discount outside [0, 1].
    """

    def __init__(self, P: Tensor, R: Tensor, discount: float, start: Tensor | None = None):
        if P.ndim != 3 or P.shape[0] != P.shape[2] or not P.numel():
            raise SteersmanError(f"P must have shape [states, actions, states], got {list(P.shape)}")
        S, A, _ = P.shape
        if R.shape not in ((S, A), (S, A, S)):
            raise SteersmanError(f"R must have shape {[S, A]} or {[S, A, S]}, got {list(R.shape)}")
        if not R.isfinite().all():
            raise SteersmanError(f"R{torch.nonzero(~R.isfinite())[0].tolist()} is not finite")
        if not 0 <= discount <= 1:
            raise SteersmanError(f"discount {discount} is outside [0, 1]")
        self.P, self.discount = stochastic(P, "P"), discount
        R = R.to(torch.float64)
        self.R = R if R.ndim == 2 else (self.P * R).sum(-1)
        start = torch.full((S,), 1 / S, dtype=torch.float64) if start is None else start
        if start.shape != (S,):
            raise SteersmanError(f"start must have shape {[S]}, got {list(start.shape)}")
        self.start = stochastic(start, "start")
        stays = self.P[torch.arange(S), :, torch.arange(S)] == 1
        self.terminal = (stays & (self.R == 0)).all(-1)

    @property
    def states(self) -> int:
        return self.P.shape[0]

    @property
    def actions(self) -> int:
        return self.P.shape[1]

    def q(self, value: Float[Tensor, " S"]) -> Float[Tensor, "S A"]:
        """Q(s, a) = R(s, a) + discount sum_s' P(s'|s, a) V(s')."""
        return self.R + self.discount * self.P @ value

    def under(self, policy: Policy) -> tuple[MarkovChain, Float[Tensor, " S"]]:
        """The Markov chain and the reward per state that remain when the policy chooses.

        Raises SteersmanError when the policy does not fit this process.
        """
        if policy.ndim == 1 and len(policy) == self.states:
            policy = torch.nn.functional.one_hot(policy.long(), self.actions)
        if policy.shape != (self.states, self.actions):
            raise SteersmanError(
                f"a policy has shape {[self.states]} (actions) or {[self.states, self.actions]} "
                f"(probabilities), got {list(policy.shape)}"
            )
        prob = stochastic(policy, "policy")
        return MarkovChain(torch.einsum("sa,sat->st", prob, self.P)), (prob * self.R).sum(-1)

    def evaluate(self, policy: Policy) -> Float[Tensor, " S"]:
        """V^pi by one linear solve of V = R_pi + discount P_pi V."""
        chain, reward = self.under(policy)
        return chain.expected_return(reward, self.discount)

    def performance(self, policy: Policy) -> Float[Tensor, ""]:
        """The expected return of the policy from the start distribution. What it does where it never comes from
        there does not count.

        Raises SteersmanError where that has no limit.
        """
        chain, reward = self.under(policy)
        visited = chain.reached(self.start > 0)
        return self.start @ chain.expected_return(torch.where(visited, reward, 0.0), self.discount)


def policy_evaluation(mdp: MDP, policy: Policy, tolerance: float = 1e-12, sweeps: int = 100_000) -> Tensor:
    """V^pi by repeated backups V <- R_pi + discount P_pi V, until no value moves by more than `tolerance`."""
    chain, reward = mdp.under(policy)
    value = torch.zeros_like(reward)
    for _ in range(sweeps):
        after = reward + mdp.discount * chain.P @ value
        if float((after - value).abs().max()) <= tolerance:
            return after
        value = after
    raise SteersmanError(
        f"policy evaluation did not settle in {sweeps} sweeps: at discount {mdp.discount} the value may have "
        "no limit; lower the discount or raise the tolerance"
    )


def value_iteration(mdp: MDP, tolerance: float = 1e-12, sweeps: int = 100_000) -> Solution:
    """V <- max_a Q(s, a) until no value moves by more than `tolerance`.

    At discount 1 the greedy policy of tied actions may loop without ever ending; `policy_iteration` avoids it.
    """
    value = torch.zeros(mdp.states, dtype=torch.float64)
    for sweep in range(1, sweeps + 1):
        q = mdp.q(value)
        after = q.amax(-1)
        moved = float((after - value).abs().max())
        value = after
        if moved <= tolerance:
            q = mdp.q(value)
            return Solution(value, q, q.argmax(-1), sweep)
    raise SteersmanError(
        f"value iteration did not settle in {sweeps} sweeps: at discount {mdp.discount} the value may have "
        "no limit; lower the discount or raise the tolerance"
    )


def policy_iteration(mdp: MDP, improvements: int = 10_000) -> Solution:
    """Exact evaluation, greedy improvement, until no action is better.

    Starts from the uniformly random policy, which ends wherever any policy can, so that it works at discount 1
    too. An action is replaced only by one that is better beyond rounding: ties cannot cycle.
    """
    value = mdp.evaluate(torch.full((mdp.states, mdp.actions), 1 / mdp.actions, dtype=torch.float64))
    policy = mdp.q(value).argmax(-1)
    for count in range(1, improvements + 1):
        value = mdp.evaluate(policy)
        q = mdp.q(value)
        better = q.amax(-1) > value + 1e-11 * (1 + value.abs())
        if not better.any():
            return Solution(value, q, policy, count)
        policy = torch.where(better, q.argmax(-1), policy)
    raise SteersmanError(f"policy iteration did not settle in {improvements} improvements")


def linear_program(mdp: MDP) -> Solution:
    """The optimum by linear programming, an oracle that shares nothing with the iterations.

    minimise sum_s V(s)  subject to  V(s) >= R(s, a) + discount sum_s' P(s'|s, a) V(s')  for all s, a

    Terminal states are fixed at 0.

    Raises SteersmanError when there is no finite optimum (discount 1 and a loop that pays).
    """
    S, A = mdp.states, mdp.actions
    backup = csr_array(mdp.P.reshape(S * A, S).numpy())
    own = vstack([eye_array(S, format="csr")] * A).tocsr()[np.arange(S * A).reshape(A, S).T.ravel()]
    bounds = [(0, 0) if end else (None, None) for end in mdp.terminal.tolist()]
    out = linprog(
        np.ones(S), A_ub=mdp.discount * backup - own, b_ub=-mdp.R.reshape(-1).numpy(), bounds=bounds, method="highs"
    )
    if out.status != 0:
        raise SteersmanError(f"the linear program has no optimum at discount {mdp.discount}: {out.message}")
    value = torch.from_numpy(np.asarray(out.x))
    q = mdp.q(value)
    return Solution(value, q, q.argmax(-1), int(out.nit))
