"""Where the preference losses lead that hold each answer against the reference itself."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from steersman.loss.anchored import apo_down, apo_zero, bco_pair, cal_dpo, nca, sppo
from steersman.tabular.fixed_point import FixedPoint, imbalance, row_of, row_of_one_answer
from steersman.tabular.population import Population, descend
from steersman.tabular.token_mdp import TokenMDP


def check_cal_dpo(mdp: TokenMDP) -> FixedPoint:
    return _fitted("cal_dpo", cal_dpo, mdp, logistic=True)


def check_sppo(mdp: TokenMDP) -> FixedPoint:
    return _fitted("sppo", sppo, mdp, logistic=False)


def _fitted(name: str, loss: Callable, mdp: TokenMDP, *, logistic: bool) -> FixedPoint:
    """Per answer, with s how often it is shown and P how often it wins: dL / d rho = 2 s (rho - (P - 1/2) / beta),
    less its pull in the logistic term, must be in proportion to pi."""
    world, beta = Population(mdp), mdp.beta
    logits = descend(world.expected(lambda pair: loss(pair, beta=beta)[0]), mdp.logp_ref)
    rho = world.log_ratio(logits)
    shown = world.marginal(world.chosen) + world.marginal(world.rejected)
    slope = 2 * shown * (rho - (world.marginal(world.chosen) / shown - 0.5) / beta)
    if logistic:
        pull = world.prob / (1 + (rho[world.chosen] - rho[world.rejected]).exp())
        slope = slope.index_add(0, world.chosen, -pull).index_add(0, world.rejected, pull)
    statement = "shown(y) (rho(y) - (P(y wins) - 1/2) / beta)" + (", less its logistic pull," if logistic else "")
    return _balanced(name, f"{statement} is in proportion to pi(y)", world, logits, slope)


def check_nca(mdp: TokenMDP) -> FixedPoint:
    world = Population(mdp)
    logits = descend(world.expected(lambda pair: nca(pair, beta=mdp.beta)[0]), mdp.logp_ref)
    over = 1 / (1 + (-mdp.beta * world.log_ratio(logits)).exp())
    c, d = world.marginal(world.chosen), world.marginal(world.rejected)
    slope = (c + d) / 2 * over - c * (1 - over)
    statement = "shown(y) sigma(beta rho) / 2 - chosen(y) sigma(-beta rho) is in proportion to pi(y)"
    return _balanced("nca", statement, world, logits, slope)


def check_bco_pair(mdp: TokenMDP) -> FixedPoint:
    world = Population(mdp)
    logits = descend(world.expected(lambda pair: bco_pair(pair, beta=mdp.beta)[0]), mdp.logp_ref)
    over = 1 / (1 + (-mdp.beta * world.log_ratio(logits)).exp())
    slope = world.marginal(world.rejected) * over - world.marginal(world.chosen) * (1 - over)
    statement = "rejected(y) sigma(beta rho) - chosen(y) sigma(-beta rho) is in proportion to pi(y)"
    return _balanced("bco_pair", statement, world, logits, slope)


def check_apo_zero(mdp: TokenMDP) -> FixedPoint:
    """Per answer the loss is linear in sigma(beta rho): whether it is chosen or rejected more often decides all."""
    world = Population(mdp)
    logits = descend(world.expected(lambda pair: apo_zero(pair, beta=mdp.beta)[0]), mdp.logp_ref)
    worse = world.marginal(world.chosen) < world.marginal(world.rejected)
    mass = mdp.sequence_prob(logits)[worse].sum()
    statement = "no mass on answers that are rejected more often than chosen"
    return row_of("apo_zero", statement, world, logits, float(mass))


def check_apo_down(mdp: TokenMDP) -> FixedPoint:
    """It pushes every answer below the reference, which a policy can do with all but one answer of a prompt."""
    world = Population(mdp)
    logits = descend(world.expected(lambda pair: apo_down(pair, beta=mdp.beta)[0]), mdp.logp_ref)
    return row_of_one_answer("apo_down", world, logits)


def _balanced(name: str, statement: str, world: Population, logits: Tensor, slope: Float[Tensor, " N"]) -> FixedPoint:
    """dL / d rho per answer, up to a factor, must be in proportion to pi."""
    mdp = world.mdp
    pi = mdp.sequence_prob(logits) / mdp.prompt_prob[mdp.prompt]
    return row_of(name, statement, world, logits, imbalance(world, slope, pi), tolerance=1e-6)
