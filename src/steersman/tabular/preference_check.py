"""Where every offline loss leads: population descent on the token MDP beside the stated fixed point."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.loss.f_divergence import fdpo_alpha, fdpo_js
from steersman.loss.preference import (
    desensitised,
    discopop,
    dpo,
    dpo_norm,
    dpo_shift,
    dpop,
    exo,
    ipo,
    robust_dpo,
    rso,
    tdpo1,
    tdpo2,
    wpo,
)
from steersman.tabular.anchored_check import (
    check_apo_down,
    check_apo_zero,
    check_bco_pair,
    check_cal_dpo,
    check_nca,
    check_sppo,
)
from steersman.tabular.feedback_check import check_apo_zero_unpaired, check_bco, check_kto
from steersman.tabular.fixed_point import FixedPoint, example, imbalance, normalised, off_vertex, row_of
from steersman.tabular.population import Population, descend, descend_frozen, descend_kinked
from steersman.tabular.reference_free_check import (
    check_alphapo,
    check_cpo,
    check_hinge,
    check_orpo,
    check_simpo,
    check_tpo,
)
from steersman.tabular.supervised_check import check_dft, check_nll
from steersman.tabular.token_mdp import TokenMDP
from steersman.tabular.transport_check import check_aot, check_aot_unpaired

__all__ = ["CHECKS", "FixedPoint", "example"]


def check_dpo(mdp: TokenMDP) -> FixedPoint:
    world = Population(mdp)
    logits = descend(world.expected(lambda pair: dpo(pair, beta=mdp.beta)[0]), mdp.logp_ref)
    deviation = world.distance(logits, mdp.closed_form()[0])
    return row_of("dpo", "pi ~ pi_ref exp(r / beta)", world, logits, deviation, reaches_optimum=True)


def check_conservative(mdp: TokenMDP, label_smoothing: float = 0.1) -> FixedPoint:
    """Smoothed labels are not Bradley-Terry any more, so only the average over opponents can be matched."""
    world = Population(mdp)
    loss = world.expected(lambda pair: dpo(pair, beta=mdp.beta, label_smoothing=label_smoothing)[0])
    logits = descend(loss, mdp.logp_ref)
    smoothed = (1 - label_smoothing) * world.prefer + label_smoothing * (1 - world.prefer)
    deviation = (world.win_rate(_implied(world, logits)) - world.win_rate(smoothed)).abs().max()
    statement = "each answer's implied win rate is its smoothed one, (1 - eps) p + eps (1 - p)"
    row = row_of("dpo", statement, world, logits, float(deviation))
    row.name, row.source = "conservative dpo", "Mitchell 2023"
    return row


def check_ld_dpo(mdp: TokenMDP, alpha: float = 0.5) -> FixedPoint:
    """With m the lead as LD-DPO weighs it, p the true preference and c 1 within the shared length and alpha beyond, a
    token's slope is the sum of c (sigma(m) - p) over the pairs whose answers have it, which must be in proportion to
    its probability. An answer has no implicit reward of its own: it depends on the length of the other one."""
    world, beta = Population(mdp), mdp.beta
    loss = world.expected(lambda pair: dpo(desensitised(pair, alpha), beta=beta)[0])
    logits = descend(loss, mdp.logp_ref)
    ratio, step = mdp.sequence_logp(logits) - mdp.sequence_logp_ref, torch.arange(mdp.horizon)

    def counts(own: Tensor, other: Tensor) -> Tensor:
        shared = torch.minimum(mdp.length[own], mdp.length[other])[:, None]
        return torch.where(step < shared, 1.0, torch.where(step < mdp.length[own][:, None], alpha, 0.0)).double()

    w, l = world.chosen, world.rejected  # noqa: E741
    count = counts(w, l)
    m = beta * ((count * ratio[w]).sum(-1) - (counts(l, w) * ratio[l]).sum(-1))
    surplus = world.weight * (1 / (1 + (-m).exp()) - world.prefer)
    edge = (mdp.path[:, :-1] * mdp.vocab + mdp.sequences)[w]  # behind the last one in the padding
    slope = surplus.new_zeros(mdp.logp_ref.numel() + 1)
    slope = slope.index_add(0, edge.flatten(), (count * surplus[:, None]).flatten())[:-1].view_as(mdp.logp_ref)
    residual = slope - torch.softmax(logits, -1) * slope.sum(-1, keepdim=True)
    statement = "each token's surplus of implied wins, alpha beyond the shared length, is in proportion to pi(a|s)"
    row = row_of("dpo", statement, world, logits, float(residual.abs().max()), tolerance=1e-6)
    row.name, row.source = "ld-dpo", "arXiv 2409.06411"
    return row


def check_robust(mdp: TokenMDP, flip: float = 0.2) -> FixedPoint:
    world = Population(mdp, flip)
    logits = descend(world.expected(lambda pair: robust_dpo(pair, beta=mdp.beta, flip=flip)[0]), mdp.logp_ref)
    deviation = world.distance(logits, mdp.closed_form()[0])
    statement = f"pi ~ pi_ref exp(r / beta), though {flip:.0%} of the labels are flipped"
    return row_of("robust_dpo", statement, world, logits, deviation, reaches_optimum=True)


def check_ipo(mdp: TokenMDP) -> FixedPoint:
    """With g = log pi/pi_ref the gradient is mu(y) (g(y) - E g - (P(y beats mu) - 1/2) / beta)."""
    world = Population(mdp)
    logits = descend(world.expected(lambda pair: ipo(pair, beta=mdp.beta)[0]), mdp.logp_ref)
    mu = mdp.sequence_logp_ref.sum(-1).exp()
    wins = (1 - mu) * world.win_rate(world.prefer) + mu / 2  # mu may also draw y itself
    deviation = world.distance(logits, mdp.sequence_logp_ref.sum(-1) + wins / mdp.beta)
    return row_of("ipo", "pi ~ pi_ref exp(P(y beats mu) / beta)", world, logits, deviation)


def check_rso(mdp: TokenMDP, margin: float = 1.0) -> FixedPoint:
    world, start = Population(mdp), mdp.sequence_logp_ref.sum(-1)
    logits = descend_kinked(world, lambda pair: rso(pair, beta=mdp.beta, margin=margin)[0], start)
    deviation = off_vertex(world, logits, world.log_ratio(logits), start, margin)
    statement = "beta log pi/pi_ref differs by whole multiples of the margin: order without strength"
    return row_of("rso", statement, world, logits, deviation)


def dpop_threshold(mdp: TokenMDP) -> float:
    """The lambda from which on DPOP's optimum is the reference, on data where every answer is chosen at times.

    With c and d the chosen and rejected marginals of a prompt, kappa = max_y (c - d) / pi_ref, no direction of
    log pi/pi_ref lowers the (convex) loss at 0 once (1 + lambda) c >= d + kappa pi_ref for every answer.
    """
    world = Population(mdp)
    c, d = world.marginal(world.chosen), world.marginal(world.rejected)
    kappa = torch.where(world.of_prompt, (c - d) / world.shown_prob, -torch.inf).amax(-1)[mdp.prompt]
    return float(((kappa * world.shown_prob + d - c) / c).max())


def check_dpop(mdp: TokenMDP) -> FixedPoint:
    world, penalty = Population(mdp), 1.05 * dpop_threshold(mdp)
    start = mdp.closed_form()[0]
    logits = descend_kinked(world, lambda pair: dpop(pair, beta=mdp.beta, penalty=penalty)[0], start)
    deviation = world.distance(logits, mdp.sequence_logp_ref.sum(-1))
    statement = f"pi = pi_ref, exactly, at lambda = {penalty:.2f}, 5% above the threshold for these noisy labels"
    return row_of("dpop", statement, world, logits, deviation)


def check_tdpo1(mdp: TokenMDP) -> FixedPoint:
    """beta (rho + D) telescopes to the sum of the reference's advantages exactly when pi is the stated policy."""
    world = Population(mdp)
    logits = descend(world.expected(lambda pair: tdpo1(pair, beta=mdp.beta)[0]), mdp.logp_ref)
    q = mdp.evaluate(mdp.logp_ref, kl=False)[1]
    deviation = world.distance(logits, mdp.sequence_logp(mdp.logp_ref + q / mdp.beta).sum(-1))
    return row_of("tdpo1", "pi(a|s) ~ pi_ref(a|s) exp(Q_ref(s, a) / beta)", world, logits, deviation)


def check_tdpo2(mdp: TokenMDP, alpha: float = 0.5) -> FixedPoint:
    """The paper's update, put together from the gradients of rho and D, must vanish."""
    world, beta = Population(mdp), mdp.beta

    def loss(logits: Tensor, chosen_kl: Tensor) -> Tensor:
        pair = world.pair(logits)._replace(chosen_kl=chosen_kl)
        return (world.prob * tdpo2(pair, beta=beta, alpha=alpha)[0]).sum()

    def divergence(logits: Tensor) -> Tensor:
        return world.step_kl(logits).sum(-1)

    logits = descend_frozen(loss, lambda x: divergence(x)[world.chosen], mdp.logp_ref)
    w, l = world.chosen, world.rejected  # noqa: E741
    rho, D = world.log_ratio(logits), divergence(logits)
    slope_rho = torch.autograd.functional.jacobian(world.log_ratio, logits).flatten(1)
    slope_D = torch.autograd.functional.jacobian(divergence, logits).flatten(1)
    pull = world.prob * torch.sigmoid(-beta * (rho[w] - rho[l] - alpha * (D[l] - D[w])))
    update = (pull[:, None] * (slope_rho[w] - slope_rho[l] - alpha * slope_D[l])).sum(0)
    statement = "the semi-gradient vanishes, between TDPO1's policy and the reference"
    return row_of("tdpo2", statement, world, logits, float(update.abs().max()), tolerance=1e-6)


def check_dpo_shift(mdp: TokenMDP, shift: float = 0.8) -> FixedPoint:
    world, beta = Population(mdp), mdp.beta
    logits = descend(world.expected(lambda pair: dpo_shift(pair, beta=beta, shift=shift)[0]), mdp.logp_ref)
    rho = world.log_ratio(logits)
    pull = world.prob / (1 + (beta * (rho[world.chosen] - shift * rho[world.rejected])).exp())
    zero = torch.zeros_like(rho)
    net = zero.index_add(0, world.chosen, pull).index_add(0, world.rejected, -shift * pull)
    pi = mdp.sequence_prob(logits) / mdp.prompt_prob[mdp.prompt]
    statement = f"the pull as chosen less {shift:g} times that as rejected is pi times what is left over"
    return row_of("dpo_shift", statement, world, logits, imbalance(world, net, pi), tolerance=1e-6)


def check_wpo(mdp: TokenMDP) -> FixedPoint:
    """The weights are held while the loss is descended, and renewed."""
    world = Population(mdp)

    def loss(logits: Tensor, own: Tensor) -> Tensor:
        return (world.prob * wpo(world.pair(logits)._replace(log_weight=own), beta=mdp.beta)[0]).sum()

    def own(logits: Tensor) -> Tensor:
        found = world.pair(logits).log_weight
        assert found is not None
        return found.detach()

    logits = descend_frozen(loss, own, mdp.logp_ref)
    deviation = world.distance(logits, mdp.closed_form()[0])
    statement = "pi ~ pi_ref exp(r / beta): weights that both orders of a pair share move no optimum"
    return row_of("wpo", statement, world, logits, deviation, reaches_optimum=True)


def check_dpo_norm(mdp: TokenMDP, beta: float = 2.0) -> FixedPoint:
    world, length, ref = Population(mdp), mdp.length.double(), mdp.sequence_logp_ref.sum(-1)
    logits = descend(world.expected(lambda pair: dpo_norm(pair, beta=beta)[0]), mdp.logp_ref)
    optimum = normalised(world, lambda c: ref + length * (mdp.total_reward + c) / beta)
    statement = "pi(y) = pi_ref(y) exp(|y| (r(y) + c) / beta)"
    return row_of("dpo_norm", statement, world, logits, world.distance(logits, optimum))


def check_exo(mdp: TokenMDP, epsilon: float = 0.1) -> FixedPoint:
    """With m = beta (rho(w) - rho(l)) and p the true preference, a pair's two labels together have the slope
    sigma(m) sigma(-m) (m - (2 p - 1) log((1 - eps) / eps)), which must balance for every answer."""
    world, beta = Population(mdp), mdp.beta
    logits = descend(world.expected(lambda pair: exo(pair, beta=beta, epsilon=epsilon)[0]), mdp.logp_ref)
    rho = world.log_ratio(logits)
    m = beta * (rho[world.chosen] - rho[world.rejected])
    undecided = 1 / (2 + m.exp() + (-m).exp())
    lead = m - (2 * world.prefer - 1) * math.log((1 - epsilon) / epsilon)
    net = torch.zeros_like(rho).index_add(0, world.chosen, world.weight * undecided * lead)
    statement = "beta (rho(y) - rho(y')) is (2 p - 1) log((1 - eps) / eps), averaged over y' where it is undecided"
    return row_of("exo", statement, world, logits, float(net.abs().max()), tolerance=1e-6)


def check_discopop(mdp: TokenMDP, tau: float = 0.05) -> FixedPoint:
    world, beta = Population(mdp), mdp.beta
    logits = descend(world.expected(lambda pair: discopop(pair, beta=beta, tau=tau)[0]), mdp.logp_ref)
    rho = world.log_ratio(logits)
    m = beta * (rho[world.chosen] - rho[world.rejected])
    g = 1 / (1 + (-m / tau).exp())
    slope = g * (1 - g) / tau * ((1 + (-m).exp()).log().neg() + (-m).exp()) - g * (-m).exp() - (1 - g) / (1 + m.exp())
    pull = world.prob * slope
    net = torch.zeros_like(rho).index_add(0, world.chosen, pull).index_add(0, world.rejected, -pull)
    statement = "the pulls of every answer's pairs, logistic and exponential, balance"
    return row_of("discopop", statement, world, logits, float(net.abs().max()), tolerance=1e-6)


def check_fdpo_alpha(mdp: TokenMDP, alpha: float = 0.5) -> FixedPoint:
    world, ref = Population(mdp), mdp.sequence_logp_ref.sum(-1)
    logits = descend(world.expected(lambda pair: fdpo_alpha(pair, beta=mdp.beta, alpha=alpha)[0]), mdp.logp_ref)

    def optimum(c: Tensor) -> Tensor:
        return ref - torch.log((1 - alpha * (mdp.total_reward + c) / mdp.beta).clamp(min=1e-300)) / alpha

    statement = "pi(y) = pi_ref(y) (1 - alpha (r(y) + c) / beta)^(-1 / alpha)"
    return row_of("fdpo_alpha", statement, world, logits, world.distance(logits, normalised(world, optimum)))


def check_fdpo_js(mdp: TokenMDP) -> FixedPoint:
    world, ref = Population(mdp), mdp.sequence_logp_ref.sum(-1)
    logits = descend(world.expected(lambda pair: fdpo_js(pair, beta=mdp.beta)[0]), mdp.logp_ref)

    def optimum(c: Tensor) -> Tensor:
        return ref - torch.log((2 * (-(mdp.total_reward + c) / mdp.beta).exp() - 1).clamp(min=1e-300))

    statement = "pi(y) = pi_ref(y) / (2 exp(-(r(y) + c) / beta) - 1)"
    return row_of("fdpo_js", statement, world, logits, world.distance(logits, normalised(world, optimum)))


def _implied(world: Population, logits: Tensor) -> Float[Tensor, " M"]:
    """sigma(beta (rho(w) - rho(l))) of every pair."""
    rho = world.mdp.beta * world.log_ratio(logits)
    return torch.sigmoid(rho[world.chosen] - rho[world.rejected])


CHECKS: dict[str, Callable[[TokenMDP], FixedPoint]] = {
    "dpo": check_dpo,
    "conservative dpo": check_conservative,
    "ld-dpo": check_ld_dpo,
    "robust_dpo": check_robust,
    "ipo": check_ipo,
    "hinge": check_hinge,
    "rso": check_rso,
    "dpop": check_dpop,
    "tdpo1": check_tdpo1,
    "tdpo2": check_tdpo2,
    "simpo": check_simpo,
    "alphapo": check_alphapo,
    "dpo_shift": check_dpo_shift,
    "wpo": check_wpo,
    "cal_dpo": check_cal_dpo,
    "sppo": check_sppo,
    "dpo_norm": check_dpo_norm,
    "exo": check_exo,
    "discopop": check_discopop,
    "fdpo_alpha": check_fdpo_alpha,
    "fdpo_js": check_fdpo_js,
    "nca": check_nca,
    "bco_pair": check_bco_pair,
    "apo_zero": check_apo_zero,
    "apo_down": check_apo_down,
    "aot": check_aot,
    "aot_unpaired": check_aot_unpaired,
    "orpo": check_orpo,
    "cpo": check_cpo,
    "tpo": check_tpo,
    "kto": check_kto,
    "apo_zero_unpaired": check_apo_zero_unpaired,
    "bco": check_bco,
    "nll": check_nll,
    "dft": check_dft,
}
