"""Where the supervised losses lead, on answers drawn from the best policy."""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.loss.supervised import dft, nll
from steersman.tabular.fixed_point import FixedPoint
from steersman.tabular.population import Population, descend
from steersman.tabular.token_mdp import TokenMDP


def check_nll(mdp: TokenMDP) -> FixedPoint:
    world, drawn = Population(mdp), mdp.sequence_prob(mdp.pi_star())
    logits = descend(lambda x: (drawn[:, None] * nll(mdp.sequence_logp(x))).sum(), mdp.logp_ref)
    deviation = world.distance(logits, mdp.closed_form()[0])
    statement = "pi is what the data were drawn from, here pi*"
    return FixedPoint("nll", "maximum likelihood", statement, world.gap(logits), deviation, reaches_optimum=True)


def check_dft(mdp: TokenMDP) -> FixedPoint:
    """Its weights carry no gradient, so its value is none that a line search could descend; and what it leaves of a
    rarer token dies out slowly, hence Adam."""
    world, drawn = Population(mdp), mdp.sequence_prob(mdp.pi_star())
    logits = mdp.logp_ref.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=1.0)
    for _ in range(500):
        loss = (drawn[:, None] * dft(mdp.sequence_logp(logits))).sum()
        (logits.grad,) = torch.autograd.grad(loss, logits)
        optimiser.step()
    rest = logits.detach()
    statement = "all mass on the token that the data have most often after each prefix"
    return FixedPoint("dft", "arXiv 2508.05629", statement, world.gap(rest), _off_commonest(mdp, rest, mdp.pi_star()))


def _off_commonest(mdp: TokenMDP, logits: Tensor, data: Tensor) -> float:
    """The largest probability, over prefixes, of all tokens but the one that the data have most often there."""
    pi = torch.softmax(logits, -1)
    return float((1 - pi.gather(-1, data.argmax(-1, keepdim=True))).max())
