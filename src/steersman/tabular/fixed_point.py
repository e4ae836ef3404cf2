"""A method descended to rest on the token MDP, beside the fixed point that is stated of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.loss.offline import LOSSES
from steersman.tabular.population import Population
from steersman.tabular.token_mdp import TokenMDP


@dataclass(slots=True)
class FixedPoint:
    """One method, descended to rest.

    `gap` is J* - J of the KL-regularised reward, for every method. `deviation` is the distance from the
    method's own `statement`: the total variation to the stated policy, or the largest residual of the stated
    condition. `reaches_optimum` says that the stated policy is the KL-regularised optimum.
    """

    name: str
    source: str
    statement: str
    gap: float
    deviation: float
    tolerance: float = 1e-4
    reaches_optimum: bool = False

    @property
    def holds(self) -> bool:
        return self.deviation < self.tolerance and (not self.reaches_optimum or self.gap < 1e-4)


def example(beta: float = 0.5, seed: int = 0) -> TokenMDP:
    """Two prompts, answers of one to three tokens, standard normal rewards, and a reference not far from flat."""
    rough = TokenMDP.random(3, 3, beta, seed=seed, prompts=2)
    return TokenMDP(3, 3, rough.score, 0.5 * rough.logp_ref, beta, prompts=2)


def row_of(
    name: str,
    statement: str,
    world: Population,
    logits: Tensor,
    deviation: float,
    tolerance: float = 1e-4,
    reaches_optimum: bool = False,
) -> FixedPoint:
    """What is reported of the method of this name, at rest at `logits`."""
    source = LOSSES[name].source
    return FixedPoint(name, source, statement, world.gap(logits), deviation, tolerance, reaches_optimum)


def imbalance(world: Population, G: Float[Tensor, " N"], pi: Float[Tensor, " N"]) -> float:
    """max |G - pi sum G|, the gradient with respect to the logits of a softmax over the answers of a prompt."""
    total = torch.zeros_like(world.mdp.prompt_prob).index_add(0, world.mdp.prompt, G)
    return float((G - pi * total[world.mdp.prompt]).abs().max())


def normalised(world: Population, logp: Callable[[Tensor], Tensor]) -> Float[Tensor, " N"]:
    """logp(c) with the c per prompt (bisection; logp grows with c) at which its probabilities add up to 1."""
    low = torch.full((len(world.mdp.prompts),), -100.0, dtype=torch.float64)
    high = -low
    for _ in range(80):
        c = (low + high) / 2
        mass = torch.where(world.of_prompt, logp(c[world.mdp.prompt]), -torch.inf).logsumexp(-1)
        low, high = torch.where(mass < 0, c, low), torch.where(mass < 0, high, c)
    return logp(low[world.mdp.prompt])


def off_vertex(world: Population, logits: Tensor, score: Tensor, base: Tensor, margin: float) -> float:
    """A sum of hinges in differences is minimal at a vertex, and the vertices are whole multiples of the margin."""
    mdp = world.mdp
    reward = mdp.beta * score
    rows = torch.where(world.of_prompt, mdp.sequence_prob(logits), -1).argmax(-1)
    zero = reward[rows][mdp.prompt]
    vertex = zero + margin * torch.round((reward - zero) / margin)
    return world.distance(logits, base + vertex / mdp.beta)


def row_of_one_answer(name: str, world: Population, logits: Tensor) -> FixedPoint:
    """The row of a loss that puts all mass on one answer of each prompt."""
    pi = world.mdp.sequence_prob(logits) / world.mdp.prompt_prob[world.mdp.prompt]
    others = 1 - torch.where(world.of_prompt, pi, 0).amax(-1)
    return row_of(name, "all mass on one answer of each prompt", world, logits, float(others.max()))
