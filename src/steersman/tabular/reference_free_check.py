"""Where the preference losses without a reference lead."""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.loss.pairs import gold_nll
from steersman.loss.reference_free import alphapo, cpo, hinge, orpo, simpo
from steersman.tabular.fixed_point import FixedPoint, imbalance, normalised, off_vertex, row_of
from steersman.tabular.population import Population, descend, descend_kinked
from steersman.tabular.token_mdp import TokenMDP


def check_hinge(mdp: TokenMDP, margin: float = 1.0) -> FixedPoint:
    world, start = Population(mdp), torch.zeros(len(mdp), dtype=torch.float64)
    logits = descend_kinked(world, lambda pair: hinge(pair, beta=mdp.beta, margin=margin)[0], start)
    deviation = off_vertex(world, logits, mdp.sequence_logp(logits).sum(-1), start, margin)
    statement = "beta log pi differs by whole multiples of the margin, whatever pi_ref was"
    return row_of("hinge", statement, world, logits, deviation)


def check_simpo(mdp: TokenMDP) -> FixedPoint:
    world, length = Population(mdp), mdp.length.double()
    loss = world.expected(lambda pair: simpo(pair, beta=2.0, margin=0.0)[0])
    logits = descend(loss, mdp.logp_ref)
    optimum = normalised(world, lambda c: length * (mdp.total_reward + c) / 2.0)
    deviation = world.distance(logits, optimum)
    return row_of("simpo", "log pi(y) = |y| (r(y) + c) / beta at gamma = 0, for any pi_ref", world, logits, deviation)


def check_alphapo(mdp: TokenMDP, alpha: float = 0.25, beta: float = 2.5) -> FixedPoint:
    world, length = Population(mdp), mdp.length.double()
    logits = descend(world.expected(lambda pair: alphapo(pair, alpha=alpha, beta=beta, margin=0.0)[0]), mdp.logp_ref)

    def optimum(c: Tensor) -> Tensor:
        return -length / alpha * torch.log((1 - alpha * (mdp.total_reward + c) / beta).clamp(min=1e-300))

    statement = "pi(y) = (1 - alpha (r(y) + c) / beta)^(-|y| / alpha) at gamma = 0, for any pi_ref"
    return row_of("alphapo", statement, world, logits, world.distance(logits, normalised(world, optimum)))


def check_orpo(mdp: TokenMDP, weight: float = 1.0) -> FixedPoint:
    """With G = dL / d log pi(y), a policy is stationary when G - pi sum G = 0 within each prompt."""
    world, length = Population(mdp), mdp.length.double()
    logits = descend(world.expected(lambda pair: orpo(pair, weight=weight)[0]), mdp.logp_ref)
    pi = mdp.sequence_prob(logits) / mdp.prompt_prob[mdp.prompt]
    p = pi ** (1 / length)
    odds = p / (1 - p)
    lost = world.prob * odds[world.rejected] / (odds[world.chosen] + odds[world.rejected])
    zero = torch.zeros_like(pi)
    pull = zero.index_add(0, world.chosen, lost).index_add(0, world.rejected, -lost)
    G = -(world.marginal(world.chosen) + weight * pull / (1 - p)) / length
    statement = "chosen marginal / |y| and the odds term's pull, scaled by 1 / (|y| (1 - p)), balance against pi"
    return row_of("orpo", statement, world, logits, imbalance(world, G, pi), tolerance=1e-6)


def check_cpo(mdp: TokenMDP, nll_weight: float = 1.0) -> FixedPoint:
    world = Population(mdp)
    loss = world.expected(lambda pair: cpo(pair, beta=mdp.beta, nll_weight=nll_weight)[0])
    logits = descend(loss, mdp.logp_ref)
    pi = mdp.sequence_prob(logits)
    reward = mdp.beta * mdp.sequence_logp(logits).sum(-1)
    implied = torch.sigmoid(reward[world.chosen] - reward[world.rejected])
    seen = pi.new_zeros(len(mdp)).index_add(0, world.chosen, 2 * world.weight)
    surplus = mdp.beta * seen * (world.win_rate(implied) - world.win_rate(world.prefer))
    residual = surplus - nll_weight * (world.marginal(world.chosen) - pi)
    statement = "the excess of implied over true wins pays for lambda (q - pi), q the chosen answers' distribution"
    return row_of("cpo", statement, world, logits, float(residual.abs().max()), tolerance=1e-6)


def check_tpo(mdp: TokenMDP, weight: float = 1.0) -> FixedPoint:
    """Gold answers are drawn from a distribution g that is better than the policy's optimum: pi* with doubled
    odds."""
    world, beta, length = Population(mdp), mdp.beta, mdp.length.double()
    gold = mdp.prompt_prob[mdp.prompt] * world.normal(2 * mdp.closed_form()[0]).exp()
    compared = world.expected(lambda pair: cpo(pair, beta=beta, nll_weight=0.0)[0])

    def loss(logits: Tensor) -> Tensor:
        return compared(logits) + weight * (gold * gold_nll(mdp.sequence_logp(logits), mdp.mask)).sum()

    logits = descend(loss, mdp.logp_ref)
    pi, reward = mdp.sequence_prob(logits) / mdp.prompt_prob[mdp.prompt], beta * mdp.sequence_logp(logits).sum(-1)
    implied = 1 / (1 + (reward[world.rejected] - reward[world.chosen]).exp())
    seen = pi.new_zeros(len(mdp)).index_add(0, world.chosen, 2 * world.weight)
    surplus = beta * seen * (world.win_rate(implied) - world.win_rate(world.prefer))
    statement = "the excess of implied over true wins, less alpha g(y) / |y|, is in proportion to pi(y)"
    deviation = imbalance(world, surplus - weight * gold / length, pi)
    row = row_of("cpo", statement, world, logits, deviation, tolerance=1e-6)
    row.name, row.source = "tpo", "arXiv 2405.16681"
    return row
