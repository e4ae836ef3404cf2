"""Losses of a batch's distributions: alignment via optimal transport (AOT, arXiv 2406.05882).

Two measures on the real line, the pairs' own values u and the values v that they should dominate, are carried onto
each other at the least cost

    min over couplings of  E[h(u - v)] = integral over t in [0, 1] of h(Q_u(t) - Q_v(t)),
    h(x) = -(1 - eps) log sigma(beta x) - eps log sigma(-beta x)

with Q the quantile functions: h is convex, so mass goes across in order, and sorting finds the coupling. Where all
pairs count alike that is the mean of h over the values at the same place of both sorted lists. Where they do not (a
row's weight, soft labels, which count a pair both ways) mass is split, as if every pair stood there as often as it
counts.

The functions take and return what those of `preference` do. A pair's loss, `[B]`, is the mean over the mass that is
its own, so that the sum over a batch, each weighed by its row, is the whole. What stands opposite in the sorted lists
belongs to other pairs: it comes from `PairLogp.batch`, which is read before the update and carries no gradient. The
gradient of the sum is the exact one all the same (of the sorted batch in one piece, where no two values are equal),
whatever micro-batches the pairs are in, because the coupling is constant around a point.

Departures from the paper: of its costs the logistic one alone, and hard sorting alone. TRL 1.16 has the same two,
over what each device holds of a batch; here it is over the whole batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from steersman.loss.pairs import BatchLogp, Explain, PairLogp, implicit_rewards, log_ratios
from steersman.types import send


def aot(pair: PairLogp, *, beta: float = 0.1, label_smoothing: float = 0.0) -> tuple[Float[Tensor, " B"], Explain]:
    """Paired AOT: the chosen answers' leads in log-probability shall dominate the leads that they have in the
    reference.

        u = log pi(w) - log pi(l),     v = log pi_ref(w) - log pi_ref(l)

    Over a batch of one pair it is DPO. `label_smoothing` is eps in [0, 1/2).

    Source: arXiv 2406.05882, section 3 (as TRL names it); the formula as in TRL 1.16.
    """
    batch = whole_batch(pair)
    u = both_ways(batch.chosen - batch.rejected, batch.rejected - batch.chosen)
    v = both_ways(batch.ref_chosen - batch.ref_rejected, batch.ref_rejected - batch.ref_chosen)
    own = pair.chosen - pair.rejected
    row, across, share = opposite(u, v, batch, own.device)
    loss = torch.zeros_like(own).index_add(0, row, share * _cost(own[row] - across, beta, label_smoothing))
    ratio_w, ratio_l = log_ratios(pair)
    return loss, implicit_rewards(beta * ratio_w, beta * ratio_l)


def aot_unpaired(
    pair: PairLogp, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> tuple[Float[Tensor, " B"], Explain]:
    """Unpaired AOT: the log-ratios of the chosen answers shall dominate those of the rejected ones, whatever prompt
    either answers.

        u = rho(w),     v = rho(l)

    Which answer was chosen over which is not read. A pair's loss is half that of its chosen answer's mass and half
    that of its rejected one's, with the gradient of both in full: each cost stands in the loss of two pairs, and
    moves an answer of each. `label_smoothing` is eps in [0, 1/2).

    Source: arXiv 2406.05882, section 3 (as TRL names it); the formula as in TRL 1.16.
    """
    batch = whole_batch(pair)
    batch_w, batch_l = batch.chosen - batch.ref_chosen, batch.rejected - batch.ref_rejected
    u, v = both_ways(batch_w, batch_l), both_ways(batch_l, batch_w)
    ratio_w, ratio_l = log_ratios(pair)
    row, across, share = opposite(u, v, batch, ratio_w.device)
    zero = torch.zeros_like(ratio_w)
    twice = zero.index_add(0, row, share * _cost(ratio_w[row] - across, beta, label_smoothing))
    row, across, share = opposite(v, u, batch, ratio_w.device)
    twice = twice.index_add(0, row, share * _cost(across - ratio_l[row], beta, label_smoothing))
    return twice - twice.detach() / 2, implicit_rewards(beta * ratio_w, beta * ratio_l)


def whole_batch(pair: PairLogp) -> BatchLogp:
    """The batch that the pair's rows are of. Raises TypeError where it is not there."""
    if pair.batch is None:
        raise TypeError("this loss needs the log-probabilities of the whole batch: batch")
    return pair.batch


def both_ways(given: Float[Tensor, " N"], other: Float[Tensor, " N"]) -> Float[Tensor, " M"]:
    """The values of all pairs in their given order, then under the opposite label."""
    return torch.cat([given, other])


def opposite(
    own: Float[Tensor, " M"], other: Float[Tensor, " M"], batch: BatchLogp, device: torch.device
) -> tuple[Int[Tensor, " K"], Float[Tensor, " K"], Float[Tensor, " K"]]:
    """What stands opposite to each of the rows' own values, as K pieces of mass.

    `row` is the number of the row in its micro-batch, `across` the other measure's value, `share` which part of the
    row's mass the piece is: those of a row add up to 1, and a row that counts nothing has none.
    """
    weight = torch.cat([batch.weight, batch.opposite]).double()
    i, j, mass = coupling(own, other, weight)
    rows = torch.full((len(own),), -1).scatter(0, batch.places, torch.arange(len(batch.places)))
    here = rows[i] >= 0
    i, j, mass = i[here], j[here], mass[here]
    share = (mass / weight[i]).to(own)
    return send(rows[i], device), send(other[j], device), send(share, device)


def coupling(
    first: Float[Tensor, " N"], second: Float[Tensor, " N"], weight: Float[Tensor, " N"]
) -> tuple[Int[Tensor, " K"], Int[Tensor, " K"], Float[Tensor, " K"]]:
    """The optimal transport of one measure on the line onto another, for every convex cost of the difference.

    Both have the atoms' `weight` (at least 0, not all 0). Of each piece of mass: the number of the atom that it comes
    from, that of the atom where it goes, and how much it is; at most 2 N of them.
    """
    orders = [order[weight[order] > 0] for order in (first.argsort(stable=True), second.argsort(stable=True))]
    ends = [weight[order].cumsum(0) for order in orders]
    for end in ends:  # the same but for rounding
        end[-1] = max(float(end[-1]) for end in ends)
    cut = torch.cat(ends).sort().values
    start = torch.cat([cut.new_zeros(1), cut[:-1]])
    middle, mass = ((start + cut) / 2)[cut > start], (cut - start)[cut > start]
    i, j = (order[torch.searchsorted(end, middle)] for order, end in zip(orders, ends, strict=True))
    return i, j, mass


def _cost(lead: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """h, written out above."""
    return -(1 - label_smoothing) * logsigmoid(beta * lead) - label_smoothing * logsigmoid(-beta * lead)
