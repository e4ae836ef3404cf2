"""Where the losses of whole batches lead, of which infinite data are one batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.loss.transport import aot, aot_unpaired
from steersman.tabular.fixed_point import FixedPoint, row_of, row_of_one_answer
from steersman.tabular.population import Population, descend
from steersman.tabular.token_mdp import TokenMDP


def check_aot(mdp: TokenMDP) -> FixedPoint:
    """With u a pair's lead under pi, v the reference's lead at the same quantile, a pair pulls its answers apart by
    the mean of sigma(-beta (u - v)) over its mass, and the pulls on every answer must balance."""
    world, beta = Population(mdp), mdp.beta
    logits = descend(world.expected(lambda pair: aot(pair, beta=beta)[0]), mdp.logp_ref)
    w, l = world.chosen, world.rejected  # noqa: E741
    logp, ref = mdp.sequence_logp(logits).sum(-1), mdp.sequence_logp_ref.sum(-1)
    u, v = logp[w] - logp[l], ref[w] - ref[l]
    (from_u, to_u), (from_v, to_v) = (_quantiles(x, world.prob) for x in (u, v))
    shared = torch.minimum(to_u[:, None], to_v) - torch.maximum(from_u[:, None], from_v)
    pull = (shared.clamp(min=0) / (1 + (beta * (u[:, None] - v)).exp())).sum(-1)
    net = torch.zeros_like(logp).index_add(0, w, pull).index_add(0, l, -pull)
    statement = "the pulls of every answer's pairs balance, each beside the reference's lead at the same quantile"
    return row_of("aot", statement, world, logits, float(net.abs().max()), tolerance=1e-6)


def check_aot_unpaired(mdp: TokenMDP) -> FixedPoint:
    """Stretching all log-ratios in any order in which chosen answers dominate lowers the loss, without end."""
    world = Population(mdp)
    logits = descend(world.expected(lambda pair: aot_unpaired(pair, beta=mdp.beta)[0]), mdp.logp_ref)
    return row_of_one_answer("aot_unpaired", world, logits)


def _quantiles(
    value: Float[Tensor, " M"], weight: Float[Tensor, " M"]
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Where each atom's mass begins and ends in [0, 1], in the order of the values."""
    order = value.argsort()
    end = torch.empty_like(value)
    end[order] = weight[order].cumsum(0)
    return end - weight, end
