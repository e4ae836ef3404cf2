"""Finite Markov chains: long run, hitting, absorption, expected return."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components
from torch import Tensor

from steersman.types import SteersmanError


def stochastic(P: Tensor, name: str) -> Tensor:
    """`P` in float64, after checking that its last dimension holds probabilities that add up to 1.

    What float32 rounding leaves (1e-6) is forgiven and divided out.

    Raises SteersmanError naming the first row that is no distribution.
    """
    P = P.to(torch.float64)
    wrong = ~P.isfinite().all(-1) | (P < 0).any(-1) | ((P.sum(-1) - 1).abs() > 1e-6)
    if wrong.any():
        row = tuple(torch.nonzero(wrong)[0].tolist())
        raise SteersmanError(
            f"{name}{list(row)} is no distribution: smallest entry {float(P[row].min()):g}, sum "
            f"{float(P[row].sum()):.8g}; entries must be at least 0 and add up to 1"
        )
    return P / P.sum(-1, keepdim=True)


def bellman_solve(
    P: Float[Tensor, "S S"], reward: Float[Tensor, " S"], discount: float, closed: list[list[int]]
) -> Tensor:
    """The solution of v = reward + discount P v; at discount 1, with v = 0 on the `closed` classes.

    Raises SteersmanError when discount is 1 and a closed class pays, for then the total has no limit.
    """
    if discount < 1:
        return torch.linalg.solve(torch.eye(len(P), dtype=P.dtype) - discount * P, reward)
    for members in closed:
        if (reward[members] != 0).any():
            raise SteersmanError(
                f"without a discount the total reward has no limit: state {members[0]} recurs for ever and its "
                "class pays a reward; use a discount below 1, or a policy that reaches the end"
            )
    recurrent = {s for members in closed for s in members}
    t = torch.tensor([s for s in range(len(P)) if s not in recurrent], dtype=torch.long)
    value = torch.zeros_like(reward)
    inner = torch.eye(len(t), dtype=P.dtype) - P[t][:, t]
    value[t] = torch.linalg.solve(inner, reward[t])
    return value


class MarkovChain:
    """A chain with transition matrix `P` [S, S], P[i, j] = Pr(next is j | now is i).

    Raises SteersmanError when P is not square or a row is no distribution.
    """

    def __init__(self, P: Float[Tensor, "S S"]):
        if P.ndim != 2 or P.shape[0] != P.shape[1] or not len(P):
            raise SteersmanError(f"a transition matrix is square, got shape {list(P.shape)}")
        self.P = stochastic(P, "P")

    def __len__(self) -> int:
        return len(self.P)

    @cached_property
    def classes(self) -> list[list[int]]:
        """The communicating classes: sets of states that reach each other."""
        _, label = connected_components(csr_array(self.P.numpy() > 0), directed=True, connection="strong")
        found: dict[int, list[int]] = {}
        for state, number in enumerate(label.tolist()):
            found.setdefault(number, []).append(state)
        return sorted(found.values())

    @cached_property
    def closed_classes(self) -> list[list[int]]:
        """The classes that are never left: the recurrent states. All others are transient."""
        closed = []
        for members in self.classes:
            outside = torch.ones(len(self), dtype=torch.bool)
            outside[members] = False
            if not (self.P[members][:, outside] > 0).any():
                closed.append(members)
        return closed

    def period(self, state: int) -> int:
        """The greatest common divisor of the lengths of all loops through the state's class; 0 if it has none."""
        members = next(c for c in self.classes if state in c)
        edges = self.P[members][:, members].numpy() > 0
        order, before = breadth_first_order(csr_array(edges), 0)
        depth = np.zeros(len(members), dtype=int)
        for node in order[1:]:
            depth[node] = depth[before[node]] + 1
        start, end = edges.nonzero()
        # each edge closes a loop whose length is, modulo the period, the difference in depth plus one
        return math.gcd(*(depth[start] + 1 - depth[end]).tolist())

    @property
    def irreducible(self) -> bool:
        return len(self.classes) == 1

    def stationary(self) -> Float[Tensor, "C S"]:
        """One stationary distribution per closed class, pi = pi P; every other is a mixture of these."""
        rows = torch.zeros(len(self.closed_classes), len(self), dtype=torch.float64)
        for row, members in zip(rows, self.closed_classes, strict=True):
            n = len(members)
            balance = self.P[members][:, members].T - torch.eye(n, dtype=torch.float64)
            balance[-1] = 1  # one balance equation follows from the others: replace it by the sum
            row[members] = torch.linalg.solve(balance, torch.eye(n, dtype=torch.float64)[-1])
        return rows

    def hitting_probability(self, target: Bool[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Pr(the chain is ever in `target`) from each start; 1 on the target itself."""
        open_states = self._reaching(target) & ~target
        h = target.double()
        inner = self.P[open_states][:, open_states]
        to_target = self.P[open_states][:, target].sum(-1)
        h[open_states] = torch.linalg.solve(torch.eye(len(inner), dtype=torch.float64) - inner, to_target)
        return h

    def hitting_time(self, target: Bool[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Expected steps until the chain is in `target`: 0 on it, inf where it may never come there."""
        never = ~self._reaching(target)
        # certain arrival is a matter of structure: no state that misses the target may be reached before it
        missing = self._reaching(never, through=~target)
        sure = ~missing & ~target
        time = torch.where(missing & ~target, torch.inf, 0.0).double()
        inner = self.P[sure][:, sure]
        time[sure] = torch.linalg.solve(
            torch.eye(len(inner), dtype=torch.float64) - inner, torch.ones(len(inner), dtype=torch.float64)
        )
        return time

    def absorption(self) -> Float[Tensor, "S C"]:
        """Pr(the chain ends in closed class c) from each start; columns as `closed_classes`, rows add up to 1."""
        columns = []
        for members in self.closed_classes:
            target = torch.zeros(len(self), dtype=torch.bool)
            target[members] = True
            columns.append(self.hitting_probability(target))
        return torch.stack(columns, 1)

    def expected_return(self, reward: Tensor, discount: float = 1.0) -> Float[Tensor, " S"]:
        """v(s) = E[ sum_t discount^t r_t ], the solution of v = r + discount P v.

        `reward` [S] is paid on leaving a state, or [S, S] on a transition. At discount 1 closed classes must pay
        nothing; they are worth 0.

        Raises SteersmanError for a discount outside [0, 1] or a total that has no limit.
        """
        if not 0 <= discount <= 1:
            raise SteersmanError(f"discount {discount} is outside [0, 1]")
        reward = reward.to(torch.float64)
        if reward.ndim == 2:
            reward = (self.P * reward).sum(-1)
        return bellman_solve(self.P, reward, discount, self.closed_classes)

    def reached(self, start: Bool[Tensor, " S"]) -> Bool[Tensor, " S"]:
        """The states that the chain can come to from those of `start`, themselves among them."""
        return _leading_to(start, (self.P > 0).T)

    def _reaching(self, target: Bool[Tensor, " S"], through: Bool[Tensor, " S"] | None = None) -> Bool[Tensor, " S"]:
        """The states from which `target` can be reached, stepping only on states where `through` is True."""
        edge = self.P > 0
        return _leading_to(target, edge if through is None else edge & through[:, None])


def _leading_to(target: Bool[Tensor, " S"], edge: Bool[Tensor, "S S"]) -> Bool[Tensor, " S"]:
    """The states from which `target` can be reached along edges [from, to]."""
    reach = target.clone()
    for _ in range(len(reach)):
        wider = reach | (edge & reach).any(-1)
        if torch.equal(wider, reach):
            break
        reach = wider
    return reach
