"""Every offline loss, descended on infinite data of the token MDP, rests where its theory says."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, linprog

from steersman.loss import preference as pref
from steersman.loss.feedback import kto
from steersman.loss.offline import LOSSES
from steersman.tabular import preference_check as check
from steersman.tabular import reference_free_check, transport_check
from steersman.tabular.population import Population, descend, descend_frozen, descend_kinked
from steersman.tabular.token_mdp import TokenMDP

MDP = check.example()
WORLD = Population(MDP)
BETA = MDP.beta


@cache
def row(name: str) -> check.FixedPoint:
    return check.CHECKS[name](MDP)


def rest(function, start=None, **options) -> torch.Tensor:
    return descend(
        WORLD.expected(lambda pair: function(pair, **options)[0]), MDP.logp_ref if start is None else start
    )


@pytest.mark.parametrize("name", check.CHECKS)
def test_rests_at_the_stated_fixed_point(name):
    result = row(name)
    assert result.holds, result
    if result.reaches_optimum:
        assert result.gap < 1e-4


def test_every_loss_is_checked_and_most_stop_short_of_the_optimum():
    assert set(LOSSES) <= set(check.CHECKS)
    for name in check.CHECKS:
        result = row(name)
        assert result.gap > -1e-9
        assert result.reaches_optimum == (result.gap < 1e-4), "a statement that is weaker than what happens"


def test_a_wrong_loss_does_not_pass(monkeypatch):
    """beta on one answer only: a mistake that still trains."""

    def lopsided(pair, *, beta):
        m = beta * (pair.chosen - pair.ref_chosen) - (pair.rejected - pair.ref_rejected)
        return -torch.nn.functional.logsigmoid(m), {}

    monkeypatch.setattr(check, "dpo", lopsided)
    assert not check.check_dpo(MDP).holds


def test_tpo_with_the_chosen_answers_likelihood_rests_elsewhere(monkeypatch):
    """That is CPO."""
    monkeypatch.setattr(reference_free_check, "cpo", lambda pair, beta, nll_weight: pref.cpo(pair, beta=beta))
    assert not reference_free_check.check_tpo(MDP).holds


def test_another_losses_rest_is_not_that_of_aot(monkeypatch):
    """With each pair beside its own reference's lead it is DPO, which balances other pulls."""
    monkeypatch.setattr(transport_check, "aot", pref.dpo)
    assert not transport_check.check_aot(MDP).holds


def test_ld_dpo_goes_from_the_optimum_towards_the_lengths_of_the_reference():
    def at(alpha: float) -> torch.Tensor:
        return descend(
            WORLD.expected(lambda pair: pref.dpo(pref.desensitised(pair, alpha), beta=BETA)[0]), MDP.logp_ref
        )

    def length(logits: torch.Tensor) -> float:
        return (MDP.sequence_prob(logits) * MDP.length).sum().item()

    rests = [at(alpha) for alpha in (1.0, 0.5, 0.0)]
    assert WORLD.distance(rests[0], MDP.closed_form()[0]) < 1e-4
    assert length(MDP.logp_ref) < length(rests[2]) < length(rests[1]) < length(rests[0])
    assert MDP.kl(rests[2]) < MDP.kl(rests[1]) < MDP.kl(rests[0])


def test_ld_dpo_with_a_whole_reference_rests_elsewhere(monkeypatch):
    """As LLaMA-Factory has it."""

    def policy_alone(pair, alpha):
        weighed = pref.desensitised(pair, alpha)
        return weighed._replace(ref_chosen=pair.ref_chosen, ref_rejected=pair.ref_rejected)

    monkeypatch.setattr(check, "desensitised", policy_alone)
    assert not check.check_ld_dpo(MDP).holds


def test_pairs_add_up_and_flips_keep_them():
    for flip in (0.0, 0.2):
        world = Population(MDP, flip)
        assert world.prob.sum().item() == pytest.approx(1)
        both = world.marginal(world.chosen) + world.marginal(world.rejected)
        seen = torch.zeros(len(MDP), dtype=torch.float64).index_add(0, world.chosen, 2 * world.weight)
        torch.testing.assert_close(both, seen)


# Two answers of one token: every loss's optimum is one number, found by hand or as a root of the paper's formula.

LEAD = 0.8
TWO = TokenMDP(2, 1, torch.tensor([LEAD, 0.0]), torch.tensor([[0.3, -0.4]]), beta=0.5)
WIN = 1 / (1 + math.exp(-LEAD))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def simpo_margin(gamma: float) -> float:
    """p sigma(gamma - s) = (1 - p) sigma(gamma + s), a quadratic in exp(s)."""
    c, p = math.exp(-gamma), WIN
    x = ((2 * p - 1) + math.sqrt((2 * p - 1) ** 2 + 4 * (1 - p) * p * c * c)) / (2 * (1 - p) * c)
    return math.log(x)


def dpop_margin(beta: float, lam: float) -> float:
    """p loss(m) + (1 - p) loss(-m - lambda-term) as a function of rho of the better answer alone."""
    ref = torch.softmax(torch.tensor([0.3, -0.4], dtype=torch.float64), 0).tolist()

    def slope(a: float) -> float:
        b = math.log((1 - ref[0] * math.exp(a)) / ref[1])  # rho of the worse answer
        db = -ref[0] * math.exp(a) / (1 - ref[0] * math.exp(a))
        up, down = beta * (a - b), beta * (b - a - lam * max(0.0, -b))
        d_up, d_down = beta * (1 - db), beta * (db - 1 + lam * db)  # b < 0 here
        return -WIN * d_up / (1 + math.exp(up)) - (1 - WIN) * d_down / (1 + math.exp(down))

    a = brentq(slope, 1e-9, -math.log(ref[0]) - 1e-9)
    return a - math.log((1 - ref[0] * math.exp(a)) / ref[1])


BY_HAND = {  # loss, options, lead in log pi/pi_ref (or, without a reference, in log pi) of the better answer at rest
    "dpo": (pref.dpo, {"beta": 0.5}, LEAD / 0.5, True),
    "conservative": (pref.dpo, {"beta": 0.5, "label_smoothing": 0.1}, logit(0.9 * WIN + 0.1 * (1 - WIN)) / 0.5, True),
    "ipo": (pref.ipo, {"beta": 0.5}, (2 * WIN - 1) / (2 * 0.5), True),
    "hinge": (pref.hinge, {"beta": 0.5, "margin": 1.0}, 1.0 / 0.5, False),
    "rso": (pref.rso, {"beta": 0.5, "margin": 1.0}, 1.0 / 0.5, True),
    "dpop": (pref.dpop, {"beta": 0.5, "penalty": 0.5}, dpop_margin(0.5, 0.5), True),
    "simpo": (pref.simpo, {"beta": 2.0, "margin": 0.0}, LEAD / 2, False),
    "simpo margin": (pref.simpo, {"beta": 2.0, "margin": 0.6}, simpo_margin(0.6) / 2, False),
    "cpo": (pref.cpo, {"beta": 0.5, "nll_weight": 0.0}, LEAD / 0.5, False),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_two_answers_by_hand(name):
    function, options, lead, relative = BY_HAND[name]
    world = Population(TWO)
    loss = world.expected(lambda pair: function(pair, **options)[0])
    if name in ("hinge", "rso"):
        start = TWO.sequence_logp_ref.sum(-1)
        logits = descend_kinked(world, lambda pair: function(pair, **options)[0], start, steps=300)
    else:
        logits = descend(loss, TWO.logp_ref)
    x = world.log_ratio(logits) if relative else TWO.sequence_logp(logits).sum(-1)
    better, worse = TWO.total_reward.argmax(), TWO.total_reward.argmin()
    assert (x[better] - x[worse]).item() == pytest.approx(lead, abs=1e-5)


# What the statements in LOSSES add ------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [pref.hinge, pref.rso])
def test_hinge_rests_at_the_optimum_of_its_linear_program(function):
    """min sum prob xi  with  xi >= margin - beta (g_w - g_l), xi >= 0."""
    w, l, M, N = WORLD.chosen.numpy(), WORLD.rejected.numpy(), len(WORLD.chosen), len(MDP)  # noqa: E741
    A = np.zeros((M, N + M))
    A[np.arange(M), w], A[np.arange(M), l] = -1, 1
    A[np.arange(M), N + np.arange(M)] = -1
    cost = np.concatenate([np.zeros(N), WORLD.prob.numpy()])
    program = linprog(cost, A_ub=A, b_ub=-np.ones(M), bounds=[(None, None)] * N + [(0, None)] * M)
    loss = lambda pair: function(pair, beta=BETA, margin=1.0)[0]  # noqa: E731
    logits = descend_kinked(WORLD, loss, MDP.sequence_logp_ref.sum(-1))
    assert WORLD.expected(loss)(logits).item() == pytest.approx(program.fun, abs=1e-6)


def test_ipo_optimum_maximises_its_own_objective():
    """max E[P(y beats mu)] - tau KL: no nearby policy and no other method's does better."""
    mu = MDP.sequence_logp_ref.sum(-1).exp()
    wins = (1 - mu) * WORLD.win_rate(WORLD.prefer) + mu / 2
    own = TokenMDP(3, 3, wins, MDP.logp_ref, BETA, prompts=2)
    assert (own.j_star() - own.objective(rest(pref.ipo, beta=BETA))).item() < 1e-9


def test_dpop_moves_from_the_optimum_to_the_reference_as_lambda_grows():
    threshold, kl = check.dpop_threshold(MDP), []
    for penalty in (0.0, 0.3 * threshold, 0.9 * threshold, 1.1 * threshold):
        loss = lambda pair, penalty=penalty: pref.dpop(pair, beta=BETA, penalty=penalty)[0]  # noqa: E731
        kl.append(MDP.kl(descend_kinked(WORLD, loss, MDP.closed_form()[0])).item())
    assert kl[0] == pytest.approx(MDP.kl(MDP.pi_star()).item(), abs=1e-3)
    assert kl[0] > kl[1] > kl[2] > 1e-5 > 1e-8 > kl[3], kl


def test_tdpo2_lies_between_its_neighbours():
    """alpha = 0 is DPO; alpha = 1 has TDPO1's value, but its one-sided gradient holds it nearer to the reference."""

    def at(alpha):
        def loss(logits, kl):
            pair = WORLD.pair(logits)._replace(chosen_kl=kl)
            return (WORLD.prob * pref.tdpo2(pair, beta=BETA, alpha=alpha)[0]).sum()

        return descend_frozen(loss, lambda x: WORLD.step_kl(x).sum(-1)[WORLD.chosen], MDP.logp_ref)

    def spread(logits):
        return MDP.expectation(MDP.logp_ref, WORLD.step_kl(logits).sum(-1)).item()

    assert WORLD.distance(rest(pref.tdpo2, beta=BETA, alpha=0.0), MDP.closed_form()[0]) < 1e-4
    assert spread(at(1.0)) < spread(rest(pref.tdpo1, beta=BETA))


def test_cpo_without_its_nll_is_dpo_from_a_uniform_reference():
    logits = rest(pref.cpo, beta=BETA, nll_weight=0.0)
    assert WORLD.distance(logits, MDP.total_reward / BETA) < 1e-4


def test_orpo_odds_term_alone_has_a_closed_form():
    """log odds differ by the rewards: p = sigma(r + c), pi = p^|y|, with the c at which pi adds up to 1."""
    alone = lambda pair: pref.orpo(pair, weight=1.0)[0] + pair.chosen / pair.chosen_length  # noqa: E731
    pi = MDP.sequence_prob(descend(WORLD.expected(alone), MDP.logp_ref)) * 2
    for prompt in range(2):
        r, n = MDP.total_reward[MDP.prompt == prompt], MDP.length[MDP.prompt == prompt]
        stated = lambda c, r=r, n=n: torch.sigmoid(r + c) ** n  # noqa: E731
        c = brentq(lambda c, stated=stated: stated(c).sum().item() - 1, -50, 50)
        torch.testing.assert_close(pi[MDP.prompt == prompt], stated(c), rtol=1e-4, atol=1e-6)


def test_nll_term_alone_is_the_chosen_distribution():
    logits = descend(WORLD.expected(lambda pair: pref.chosen_nll(pair, length_normalised=False)), MDP.logp_ref)
    assert WORLD.distance(logits, WORLD.marginal(WORLD.chosen).log()) < 1e-5


def test_shares_of_raters_lead_where_their_single_votes_do():
    """Each pair once, with the share of raters as its label, in the place of both orders in that proportion."""
    once = WORLD.chosen < WORLD.rejected
    weight = torch.where(once, 2 * WORLD.weight, 0.0)

    def loss(logits):
        pair = WORLD.pair(logits)
        return (weight * pref.soft_labelled(lambda p: pref.dpo(p, beta=BETA), pair, WORLD.prefer)[0]).sum()

    assert WORLD.distance(descend(loss, MDP.logp_ref), MDP.closed_form()[0]) < 1e-4


def test_kto_shares_the_mass_among_the_liked():
    """Where likes win by c(y), mu c beta s (1 - s) is proportional to pi, s = sigma(beta rho); z is 0 in the end."""
    liked = torch.sigmoid(MDP.total_reward)
    desirable = torch.cat([torch.ones(len(MDP)), torch.zeros(len(MDP))]).bool()
    prob = torch.cat([WORLD.shown_prob * liked, WORLD.shown_prob * (1 - liked)])
    ref, zero = MDP.sequence_logp_ref.sum(-1).repeat(2), torch.zeros((), dtype=torch.float64)

    def loss(answers):
        return (prob * kto(answers.repeat(2), ref, desirable, zero, beta=BETA)[0]).sum()

    theta = MDP.sequence_logp_ref.sum(-1).requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=0.05)  # small steps first: an answer that falls far is not recovered
    for _ in range(600):
        (theta.grad,) = torch.autograd.grad(loss(WORLD.normal(theta)), theta)
        optimiser.step()
    logits = descend(lambda x: loss(MDP.sequence_logp(x).sum(-1)), MDP.factor(theta.detach()))
    pi, s = MDP.sequence_prob(logits), torch.sigmoid(BETA * WORLD.log_ratio(logits))
    ratio = WORLD.shown_prob * (2 * liked - 1) * s * (1 - s) / pi
    for prompt in range(2):
        kept = (MDP.prompt == prompt) & (liked > 0.5)
        assert kept.sum() > 3
        assert pi[(MDP.prompt == prompt) & ~kept].sum() < 1e-4
        assert (pi[kept] > 1e-4).all()
        torch.testing.assert_close(ratio[kept], ratio[kept].mean().expand(int(kept.sum())), rtol=1e-3, atol=0)
