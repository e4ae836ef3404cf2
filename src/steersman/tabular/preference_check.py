"""Where every offline preference loss leads: population descent on the token MDP beside the stated fixed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.loss.feedback import bco, kto
from steersman.loss.offline import LOSSES
from steersman.loss.preference import (
    alphapo,
    cal_dpo,
    cpo,
    dpo,
    dpo_shift,
    dpop,
    hinge,
    ipo,
    orpo,
    robust_dpo,
    rso,
    simpo,
    sppo,
    tdpo1,
    tdpo2,
    wpo,
)
from steersman.tabular.population import Population, descend, descend_frozen, descend_kinked
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


def check_dpo(mdp: TokenMDP) -> FixedPoint:
    world = Population(mdp)
    logits = descend(world.expected(lambda pair: dpo(pair, beta=mdp.beta)[0]), mdp.logp_ref)
    deviation = world.distance(logits, mdp.closed_form()[0])
    return _row("dpo", "pi ~ pi_ref exp(r / beta)", world, logits, deviation, reaches_optimum=True)


def check_conservative(mdp: TokenMDP, label_smoothing: float = 0.1) -> FixedPoint:
    """Smoothed labels are not Bradley-Terry any more, so only the average over opponents can be matched."""
    world = Population(mdp)
    loss = world.expected(lambda pair: dpo(pair, beta=mdp.beta, label_smoothing=label_smoothing)[0])
    logits = descend(loss, mdp.logp_ref)
    smoothed = (1 - label_smoothing) * world.prefer + label_smoothing * (1 - world.prefer)
    deviation = (world.win_rate(_implied(world, logits)) - world.win_rate(smoothed)).abs().max()
    statement = "each answer's implied win rate is its smoothed one, (1 - eps) p + eps (1 - p)"
    row = _row("dpo", statement, world, logits, float(deviation))
    row.name, row.source = "conservative dpo", "Mitchell 2023"
    return row


def check_robust(mdp: TokenMDP, flip: float = 0.2) -> FixedPoint:
    world = Population(mdp, flip)
    logits = descend(world.expected(lambda pair: robust_dpo(pair, beta=mdp.beta, flip=flip)[0]), mdp.logp_ref)
    deviation = world.distance(logits, mdp.closed_form()[0])
    statement = f"pi ~ pi_ref exp(r / beta), though {flip:.0%} of the labels are flipped"
    return _row("robust_dpo", statement, world, logits, deviation, reaches_optimum=True)


def check_ipo(mdp: TokenMDP) -> FixedPoint:
    """With g = log pi/pi_ref the gradient is mu(y) (g(y) - E g - (P(y beats mu) - 1/2) / beta)."""
    world = Population(mdp)
    logits = descend(world.expected(lambda pair: ipo(pair, beta=mdp.beta)[0]), mdp.logp_ref)
    mu = mdp.sequence_logp_ref.sum(-1).exp()
    wins = (1 - mu) * world.win_rate(world.prefer) + mu / 2  # mu may also draw y itself
    deviation = world.distance(logits, mdp.sequence_logp_ref.sum(-1) + wins / mdp.beta)
    return _row("ipo", "pi ~ pi_ref exp(P(y beats mu) / beta)", world, logits, deviation)


def check_hinge(mdp: TokenMDP, margin: float = 1.0) -> FixedPoint:
    world, start = Population(mdp), torch.zeros(len(mdp), dtype=torch.float64)
    logits = descend_kinked(world, lambda pair: hinge(pair, beta=mdp.beta, margin=margin)[0], start)
    deviation = _off_vertex(world, logits, mdp.sequence_logp(logits).sum(-1), start, margin)
    statement = "beta log pi differs by whole multiples of the margin, whatever pi_ref was"
    return _row("hinge", statement, world, logits, deviation)


def check_rso(mdp: TokenMDP, margin: float = 1.0) -> FixedPoint:
    world, start = Population(mdp), mdp.sequence_logp_ref.sum(-1)
    logits = descend_kinked(world, lambda pair: rso(pair, beta=mdp.beta, margin=margin)[0], start)
    deviation = _off_vertex(world, logits, world.log_ratio(logits), start, margin)
    statement = "beta log pi/pi_ref differs by whole multiples of the margin: order without strength"
    return _row("rso", statement, world, logits, deviation)


def _off_vertex(world: Population, logits: Tensor, score: Tensor, base: Tensor, margin: float) -> float:
    """A sum of hinges in differences is minimal at a vertex, and the vertices are whole multiples of the margin."""
    mdp = world.mdp
    reward = mdp.beta * score
    rows = torch.where(world.own, mdp.sequence_prob(logits), -1).argmax(-1)
    zero = reward[rows][mdp.prompt]
    vertex = zero + margin * torch.round((reward - zero) / margin)
    return world.distance(logits, base + vertex / mdp.beta)


def dpop_threshold(mdp: TokenMDP) -> float:
    """The lambda from which on DPOP's optimum is the reference, on data where every answer is chosen at times.

    With c and d the chosen and rejected marginals of a prompt, kappa = max_y (c - d) / pi_ref, no direction of
    log pi/pi_ref lowers the (convex) loss at 0 once (1 + lambda) c >= d + kappa pi_ref for every answer.
    """
    world = Population(mdp)
    c, d = world.marginal(world.chosen), world.marginal(world.rejected)
    kappa = torch.where(world.own, (c - d) / world.shown, -torch.inf).amax(-1)[mdp.prompt]
    return float(((kappa * world.shown + d - c) / c).max())


def check_dpop(mdp: TokenMDP) -> FixedPoint:
    world, penalty = Population(mdp), 1.05 * dpop_threshold(mdp)
    start = mdp.closed_form()[0]
    logits = descend_kinked(world, lambda pair: dpop(pair, beta=mdp.beta, penalty=penalty)[0], start)
    deviation = world.distance(logits, mdp.sequence_logp_ref.sum(-1))
    statement = f"pi = pi_ref, exactly, at lambda = {penalty:.2f}, 5% above the threshold for these noisy labels"
    return _row("dpop", statement, world, logits, deviation)


def check_tdpo1(mdp: TokenMDP) -> FixedPoint:
    """beta (rho + D) telescopes to the sum of the reference's advantages exactly when pi is the stated policy."""
    world = Population(mdp)
    logits = descend(world.expected(lambda pair: tdpo1(pair, beta=mdp.beta)[0]), mdp.logp_ref)
    q = mdp.evaluate(mdp.logp_ref, kl=False)[1]
    deviation = world.distance(logits, mdp.sequence_logp(mdp.logp_ref + q / mdp.beta).sum(-1))
    return _row("tdpo1", "pi(a|s) ~ pi_ref(a|s) exp(Q_ref(s, a) / beta)", world, logits, deviation)


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
    return _row("tdpo2", statement, world, logits, float(update.abs().max()), tolerance=1e-6)


def check_simpo(mdp: TokenMDP) -> FixedPoint:
    world, length = Population(mdp), mdp.length.double()
    loss = world.expected(lambda pair: simpo(pair, beta=2.0, margin=0.0)[0])
    logits = descend(loss, mdp.logp_ref)
    optimum = _normalised(world, lambda c: length * (mdp.total_reward + c) / 2.0)
    deviation = world.distance(logits, optimum)
    return _row("simpo", "log pi(y) = |y| (r(y) + c) / beta at gamma = 0, for any pi_ref", world, logits, deviation)


def check_alphapo(mdp: TokenMDP, alpha: float = 0.25, beta: float = 2.5) -> FixedPoint:
    world, length = Population(mdp), mdp.length.double()
    logits = descend(world.expected(lambda pair: alphapo(pair, alpha=alpha, beta=beta, margin=0.0)[0]), mdp.logp_ref)

    def optimum(c: Tensor) -> Tensor:
        return -length / alpha * torch.log((1 - alpha * (mdp.total_reward + c) / beta).clamp(min=1e-300))

    statement = "pi(y) = (1 - alpha (r(y) + c) / beta)^(-|y| / alpha) at gamma = 0, for any pi_ref"
    return _row("alphapo", statement, world, logits, world.distance(logits, _normalised(world, optimum)))


def check_dpo_shift(mdp: TokenMDP, shift: float = 0.8) -> FixedPoint:
    world, beta = Population(mdp), mdp.beta
    logits = descend(world.expected(lambda pair: dpo_shift(pair, beta=beta, shift=shift)[0]), mdp.logp_ref)
    rho = world.log_ratio(logits)
    pull = world.prob / (1 + (beta * (rho[world.chosen] - shift * rho[world.rejected])).exp())
    zero = torch.zeros_like(rho)
    net = zero.index_add(0, world.chosen, pull).index_add(0, world.rejected, -shift * pull)
    pi = mdp.sequence_prob(logits) / mdp.prompt_prob[mdp.prompt]
    statement = f"the pull as chosen less {shift:g} times that as rejected is pi times what is left over"
    return _row("dpo_shift", statement, world, logits, _imbalance(world, net, pi), tolerance=1e-6)


def check_wpo(mdp: TokenMDP) -> FixedPoint:
    """The weights are held while the loss is descended, and renewed."""
    world = Population(mdp)

    def loss(logits: Tensor, own: Tensor) -> Tensor:
        return (world.prob * wpo(world.pair(logits)._replace(own=own), beta=mdp.beta)[0]).sum()

    def own(logits: Tensor) -> Tensor:
        found = world.pair(logits).own
        assert found is not None
        return found.detach()

    logits = descend_frozen(loss, own, mdp.logp_ref)
    deviation = world.distance(logits, mdp.closed_form()[0])
    statement = "pi ~ pi_ref exp(r / beta): weights that both orders of a pair share move no optimum"
    return _row("wpo", statement, world, logits, deviation, reaches_optimum=True)


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
    pi = mdp.sequence_prob(logits) / mdp.prompt_prob[mdp.prompt]
    statement = "shown(y) (rho(y) - (P(y wins) - 1/2) / beta)" + (", less its logistic pull," if logistic else "")
    return _row(name, f"{statement} is in proportion to pi(y)", world, logits, _imbalance(world, slope, pi), 1e-6)


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
    return _row("orpo", statement, world, logits, _imbalance(world, G, pi), tolerance=1e-6)


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
    return _row("cpo", statement, world, logits, float(residual.abs().max()), tolerance=1e-6)


def check_kto(mdp: TokenMDP, desirable_weight: float = 1.0, undesirable_weight: float = 1.33) -> FixedPoint:
    """Per answer the loss is linear in sigma(beta (rho - z)): the sign of weighted likes decides all or nothing."""
    world = Population(mdp)
    liked = torch.sigmoid(mdp.total_reward)
    mismatched = _mismatched(world)
    desirable = torch.cat([torch.ones(len(mdp)), torch.zeros(len(mdp))]).bool()
    prob = torch.cat([world.shown * liked, world.shown * (1 - liked)])

    def loss(logits: Tensor, reference_point: Tensor) -> Tensor:
        logp, ref = mdp.sequence_logp(logits).sum(-1).repeat(2), mdp.sequence_logp_ref.sum(-1).repeat(2)
        each, _ = kto(
            logp, ref, desirable, reference_point, beta=mdp.beta,
            desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
        )  # fmt: skip
        return (prob * each).sum()

    def reference_point(logits: Tensor) -> Tensor:
        return (mismatched * world.log_ratio(logits)).sum().clamp(min=0)

    logits = descend_frozen(loss, reference_point, mdp.logp_ref)
    disliked = desirable_weight * liked < undesirable_weight * (1 - liked)
    mass = mdp.sequence_prob(logits)[disliked].sum()
    statement = "no mass where lambda_U dislikes outnumber lambda_D likes"
    return _row("kto", statement, world, logits, float(mass))


def check_bco(mdp: TokenMDP) -> FixedPoint:
    """Likes are sigma(A - a) with A = r - beta log Z(x); a is set half-way between the classes' means of A."""
    world = Population(mdp)
    advantage = mdp.total_reward - mdp.closed_form()[1][mdp.prompt]

    def halfway(score: Tensor, liked: Tensor) -> Tensor:
        good, bad = world.shown * liked, world.shown * (1 - liked)
        return (good * score).sum() / good.sum() / 2 + (bad * score).sum() / bad.sum() / 2

    low, high = advantage.min(), advantage.max()
    for _ in range(60):
        a = (low + high) / 2
        above = halfway(advantage, torch.sigmoid(advantage - a)) > a
        low, high = (a, high) if above else (low, a)
    liked = torch.sigmoid(advantage - (low + high) / 2)
    desirable = torch.cat([torch.ones(len(mdp)), torch.zeros(len(mdp))]).bool()
    prob = torch.cat([world.shown * liked, world.shown * (1 - liked)])

    def loss(logits: Tensor, shift: Tensor) -> Tensor:
        logp, ref = mdp.sequence_logp(logits).sum(-1).repeat(2), mdp.sequence_logp_ref.sum(-1).repeat(2)
        return (prob * bco(logp, ref, desirable, shift, beta=mdp.beta)[0]).sum()

    def shift(logits: Tensor) -> Tensor:
        return halfway(mdp.beta * world.log_ratio(logits), liked)

    logits = descend_frozen(loss, shift, mdp.logp_ref)
    deviation = world.distance(logits, mdp.closed_form()[0])
    statement = "pi ~ pi_ref exp(r / beta), where likes are sigma(r - r0) around the classes' midpoint"
    return _row("bco", statement, world, logits, deviation, reaches_optimum=True)


def _row(
    name: str,
    statement: str,
    world: Population,
    logits: Tensor,
    deviation: float,
    tolerance: float = 1e-4,
    reaches_optimum: bool = False,
) -> FixedPoint:
    source = LOSSES[name].source
    return FixedPoint(name, source, statement, world.gap(logits), deviation, tolerance, reaches_optimum)


def _implied(world: Population, logits: Tensor) -> Float[Tensor, " M"]:
    """sigma(beta (rho(w) - rho(l))) of every pair."""
    rho = world.mdp.beta * world.log_ratio(logits)
    return torch.sigmoid(rho[world.chosen] - rho[world.rejected])


def _imbalance(world: Population, G: Float[Tensor, " N"], pi: Float[Tensor, " N"]) -> float:
    """max |G - pi sum G|, the gradient with respect to the logits of a softmax over the answers of a prompt."""
    total = torch.zeros_like(world.mdp.prompt_prob).index_add(0, world.mdp.prompt, G)
    return float((G - pi * total[world.mdp.prompt]).abs().max())


def _normalised(world: Population, logp: Callable[[Tensor], Tensor]) -> Float[Tensor, " N"]:
    """logp(c) with the c per prompt (bisection; logp grows with c) at which its probabilities add up to 1."""
    low = torch.full((len(world.mdp.prompts),), -100.0, dtype=torch.float64)
    high = -low
    for _ in range(80):
        c = (low + high) / 2
        mass = torch.where(world.own, logp(c[world.mdp.prompt]), -torch.inf).logsumexp(-1)
        low, high = torch.where(mass < 0, c, low), torch.where(mass < 0, high, c)
    return logp(low[world.mdp.prompt])


def _mismatched(world: Population) -> Float[Tensor, " N"]:
    """How often an answer meets a prompt when prompts and answers of the data are drawn apart."""
    mdp = world.mdp
    words = mdp.sequences + mdp.mask  # told apart from padding
    _, same = torch.unique(words, dim=0, return_inverse=True)
    answer = torch.zeros(int(same.max()) + 1, dtype=torch.float64).index_add(0, same, world.shown)
    return mdp.prompt_prob[mdp.prompt] * answer[same]


CHECKS: dict[str, Callable[[TokenMDP], FixedPoint]] = {
    "dpo": check_dpo,
    "conservative dpo": check_conservative,
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
    "orpo": check_orpo,
    "cpo": check_cpo,
    "kto": check_kto,
    "bco": check_bco,
}
