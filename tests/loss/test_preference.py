"""Offline preference losses beside transcriptions of the papers, value and gradient, in float64.

Every transcription takes per-token log-probabilities of one pair as plain tensors of that pair's true length and
writes the paper's formula with exp, log and division, so it shares nothing with the code under test.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from steersman.loss import feedback, preference
from steersman.loss.offline import LOSSES
from steersman.loss.preference import AnswerLogp

B, T, S = 5, 6, 4


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


# Transcriptions. y, z: per-token log pi of chosen and rejected; yr, zr: the reference's; ky, kz: KL per token.


def paper_dpo(y, z, yr, zr, ky, kz, beta):  # 2305.18290 (7)
    return -torch.log(sig(beta * (y.sum() - yr.sum()) - beta * (z.sum() - zr.sum())))


def paper_cdpo(y, z, yr, zr, ky, kz, beta, eps):
    a = paper_dpo(y, z, yr, zr, ky, kz, beta)
    b = paper_dpo(z, y, zr, yr, ky, kz, beta)  # the flipped label
    return (1 - eps) * a + eps * b


def paper_rdpo(y, z, yr, zr, ky, kz, beta, eps):  # 2403.00409
    a = paper_dpo(y, z, yr, zr, ky, kz, beta)
    b = paper_dpo(z, y, zr, yr, ky, kz, beta)
    return ((1 - eps) * a - eps * b) / (1 - 2 * eps)


def paper_ipo(y, z, yr, zr, ky, kz, tau):  # 2310.12036 (17)
    h = torch.log(torch.exp(y.sum()) * torch.exp(zr.sum()) / (torch.exp(z.sum()) * torch.exp(yr.sum())))
    return (h - 1 / (2 * tau)) ** 2


def paper_ipo_normalised(y, z, yr, zr, ky, kz, tau):
    return ((y - yr).mean() - (z - zr).mean() - 1 / (2 * tau)) ** 2


def paper_slic(y, z, yr, zr, ky, kz, delta):  # 2305.10425: no reference
    gap = delta - y.sum() + z.sum()
    return gap if gap > 0 else 0 * gap


def paper_rso_hinge(y, z, yr, zr, ky, kz, gamma):  # 2309.06657, hinge-norm
    gap = 1 - gamma * ((y.sum() - yr.sum()) - (z.sum() - zr.sum()))
    return gap if gap > 0 else 0 * gap


def paper_dpop(y, z, yr, zr, ky, kz, beta, lam):  # 2402.13228 (3)
    drop = torch.log(torch.exp(yr.sum()) / torch.exp(y.sum()))
    drop = drop if drop > 0 else 0 * drop
    return -torch.log(sig(beta * ((y.sum() - yr.sum()) - (z.sum() - zr.sum()) - lam * drop)))


def paper_tdpo1(y, z, yr, zr, ky, kz, beta):  # 2404.11999
    u = beta * (y.sum() - yr.sum()) - beta * (z.sum() - zr.sum())
    delta = beta * kz.sum() - beta * ky.sum()
    return -torch.log(sig(u - delta))


def paper_tdpo2(y, z, yr, zr, ky, kz, beta, alpha):
    u = beta * (y.sum() - yr.sum()) - beta * (z.sum() - zr.sum())
    delta2 = beta * kz.sum() - beta * ky.sum().detach()
    return -torch.log(sig(u - alpha * delta2))


def paper_simpo(y, z, yr, zr, ky, kz, beta, gamma):  # 2405.14734 (6)
    return -torch.log(sig(beta / len(y) * y.sum() - beta / len(z) * z.sum() - gamma))


def paper_orpo(y, z, yr, zr, ky, kz, lam):  # 2403.07691 (3)-(7)
    p, q = torch.exp(y.sum() / len(y)), torch.exp(z.sum() / len(z))
    ratio = (p / (1 - p)) / (q / (1 - q))
    return -y.sum() / len(y) + lam * -torch.log(sig(torch.log(ratio)))


def paper_cpo(y, z, yr, zr, ky, kz, beta):  # 2401.08417
    prefer = -torch.log(sig(beta * y.sum() - beta * z.sum()))
    return prefer - y.sum()


def paper_alphapo(y, z, yr, zr, ky, kz, beta, gamma, alpha):  # 2501.03884
    def r(x):
        return beta * (1 - torch.exp(x.sum()) ** (-alpha / len(x))) / alpha

    return -torch.log(sig(r(y) - r(z) - gamma))


def paper_dpo_shift(y, z, yr, zr, ky, kz, beta, f):  # 2502.07599 (2)
    up, down = (torch.log(torch.exp(a.sum()) / torch.exp(b.sum())) for a, b in ((y, yr), (z, zr)))
    return -torch.log(sig(beta * up - f * beta * down))


def paper_wpo(y, z, yr, zr, ky, kz, beta):  # 2406.11827; here the divergences' tensors serve as log sum pi^2
    w = torch.exp((y + ky).mean()) * torch.exp((z + kz).mean())
    w = (w if w < 1 else torch.ones_like(w)).detach()
    return w * paper_dpo(y, z, yr, zr, ky, kz, beta)


def paper_cal_dpo(y, z, yr, zr, ky, kz, beta):  # 2412.14516
    up, down = y.sum() - yr.sum(), z.sum() - zr.sum()
    return -torch.log(sig(up - down)) + (up - 1 / (2 * beta)) ** 2 + (down + 1 / (2 * beta)) ** 2


def paper_sppo(y, z, yr, zr, ky, kz, eta):  # 2405.00675 (4.7), P = 1 and 0
    return (y.sum() - yr.sum() - eta * (1 - 0.5)) ** 2 + (z.sum() - zr.sum() - eta * (0 - 0.5)) ** 2


def paper_dpo_norm(y, z, yr, zr, ky, kz, beta):  # 2411.15124
    return -torch.log(sig(beta / len(y) * (y.sum() - yr.sum()) - beta / len(z) * (z.sum() - zr.sum())))


def paper_exo(y, z, yr, zr, ky, kz, beta, eps):  # 2402.00856 (16): KL(p_f || p_r) over the two answers
    odds = torch.stack([(torch.exp(a.sum()) / torch.exp(b.sum())) ** beta for a, b in ((y, yr), (z, zr))])
    own, label = odds / odds.sum(), torch.tensor([1 - eps, eps], dtype=torch.float64)
    return (own * torch.log(own / label)).sum()


def paper_discopop(y, z, yr, zr, ky, kz, beta, tau):  # 2406.08414 (5)
    rho = beta * ((y.sum() - yr.sum()) - (z.sum() - zr.sum()))
    return torch.log(1 + torch.exp(-rho)) * (1 - sig(rho / tau)) + torch.exp(-rho) * sig(rho / tau)


def paper_fdpo(slope):  # 2309.16240: -log sigma(beta f'(u_w) - beta f'(u_l))
    def loss(y, z, yr, zr, ky, kz, beta, *rest):
        u, v = (torch.exp(a.sum()) / torch.exp(b.sum()) for a, b in ((y, yr), (z, zr)))
        return -torch.log(sig(beta * slope(u, *rest) - beta * slope(v, *rest)))

    return loss


def paper_nca(y, z, yr, zr, ky, kz, beta):  # 2402.05369, pairs
    up, down = beta * (y.sum() - yr.sum()), beta * (z.sum() - zr.sum())
    return -torch.log(sig(up)) - 0.5 * torch.log(sig(-up)) - 0.5 * torch.log(sig(-down))


def paper_apo_zero(y, z, yr, zr, ky, kz, beta):  # 2408.06266 (7)
    return -sig(beta * (y.sum() - yr.sum())) + sig(beta * (z.sum() - zr.sum())) + 1


def paper_bco_pair(y, z, yr, zr, ky, kz, beta):  # 2411.10442's quality loss, delta = 0
    return -sig(beta * (y.sum() - yr.sum())).log() - sig(-beta * (z.sum() - zr.sum())).log()


def paper_apo_down(y, z, yr, zr, ky, kz, beta):  # 2408.06266 (8)
    up, down = y.sum() - yr.sum(), z.sum() - zr.sum()
    return sig(beta * up) - sig(beta * (up - down)) + 1


CASES = {
    "dpo": (paper_dpo, (0.3,), preference.dpo, {"beta": 0.3}),
    "conservative": (paper_cdpo, (0.3, 0.2), preference.dpo, {"beta": 0.3, "label_smoothing": 0.2}),
    "robust": (paper_rdpo, (0.3, 0.2), preference.robust_dpo, {"beta": 0.3, "flip": 0.2}),
    "ipo": (paper_ipo, (0.4,), preference.ipo, {"beta": 0.4}),
    "ipo mean": (paper_ipo_normalised, (0.4,), preference.ipo, {"beta": 0.4, "length_normalised": True}),
    "slic": (paper_slic, (1.5,), preference.hinge, {"beta": 1.0, "margin": 1.5}),
    "rso": (paper_rso_hinge, (0.7,), preference.rso, {"beta": 0.7}),
    "dpop": (paper_dpop, (0.3, 5.0), preference.dpop, {"beta": 0.3, "penalty": 5.0}),
    "tdpo1": (paper_tdpo1, (0.3,), preference.tdpo1, {"beta": 0.3}),
    "tdpo2": (paper_tdpo2, (0.3, 0.7), preference.tdpo2, {"beta": 0.3, "alpha": 0.7}),
    "simpo": (paper_simpo, (2.0, 0.6), preference.simpo, {"beta": 2.0, "margin": 0.6}),
    "orpo": (paper_orpo, (0.25,), preference.orpo, {"weight": 0.25}),
    "cpo": (paper_cpo, (0.3,), preference.cpo, {"beta": 0.3}),
    "alphapo": (paper_alphapo, (2.0, 0.3, 0.5), preference.alphapo, {"beta": 2.0, "margin": 0.3, "alpha": 0.5}),
    "alphapo<0": (paper_alphapo, (2.0, 0.3, -0.5), preference.alphapo, {"beta": 2.0, "margin": 0.3, "alpha": -0.5}),
    "dpo_shift": (paper_dpo_shift, (0.3, 0.7), preference.dpo_shift, {"beta": 0.3, "shift": 0.7}),
    "wpo": (paper_wpo, (0.3,), preference.wpo, {"beta": 0.3}),
    "cal_dpo": (paper_cal_dpo, (0.3,), preference.cal_dpo, {"beta": 0.3}),
    "sppo": (paper_sppo, (2.5,), preference.sppo, {"beta": 0.4}),
    "dpo_norm": (paper_dpo_norm, (1.5,), preference.dpo_norm, {"beta": 1.5}),
    "exo": (paper_exo, (0.3, 0.02), preference.exo, {"beta": 0.3, "epsilon": 0.02}),
    "discopop": (paper_discopop, (0.3, 0.2), preference.discopop, {"beta": 0.3, "tau": 0.2}),
    "fdpo alpha": (
        paper_fdpo(lambda u, a: (1 - u**-a) / a),
        (0.3, 0.4),
        preference.fdpo_alpha,
        {"beta": 0.3, "alpha": 0.4},
    ),
    "fdpo forward": (paper_fdpo(lambda u: -1 / u), (0.02,), preference.fdpo_alpha, {"beta": 0.02, "alpha": 1.0}),
    "fdpo reverse": (paper_fdpo(torch.log), (0.3,), preference.fdpo_alpha, {"beta": 0.3, "alpha": 0.0}),
    "fdpo js": (paper_fdpo(lambda u: torch.log(2 * u / (1 + u))), (0.3,), preference.fdpo_js, {"beta": 0.3}),
    "nca": (paper_nca, (0.3,), preference.nca, {"beta": 0.3}),
    "bco pair": (paper_bco_pair, (0.3,), preference.bco_pair, {"beta": 0.3}),
    "apo zero": (paper_apo_zero, (0.3,), preference.apo_zero, {"beta": 0.3}),
    "apo down": (paper_apo_down, (0.3,), preference.apo_down, {"beta": 0.3}),
}


LOSSES_OF = {entry.function: entry for entry in LOSSES.values()}


def batch(seed: int = 0):
    """[B, T] and [B, S] log-probabilities with ragged masks (one hole), and all that the losses could read."""
    g = torch.Generator().manual_seed(seed)

    def logp(width):
        return (-2 * torch.rand(B, width, generator=g, dtype=torch.float64) - 0.05).requires_grad_()

    def kl(width):
        return torch.rand(B, width, generator=g, dtype=torch.float64).requires_grad_()

    chosen_mask = torch.arange(T) < torch.tensor([6, 3, 1, 4, 5])[:, None]
    chosen_mask[0, 2] = False
    rejected_mask = torch.arange(S) < torch.tensor([2, 4, 4, 1, 3])[:, None]
    named = {
        "chosen": logp(T), "rejected": logp(S), "ref_chosen": logp(T), "ref_rejected": logp(S),
        "chosen_kl": kl(T), "rejected_kl": kl(S),
    }  # fmt: skip
    return named, chosen_mask, rejected_mask


def pair_of(named, chosen_mask, rejected_mask, *, tails=False):
    chosen, rejected = (
        AnswerLogp(
            named[side], mask, named[f"ref_{side}"], named[f"{side}_kl"],
            log_weight=named[side] + named[f"{side}_kl"],
        )
        for side, mask in (("chosen", chosen_mask), ("rejected", rejected_mask))
    )  # fmt: skip
    pair = preference.pair_logp(chosen, rejected, tails=tails)
    return pair._replace(batch=preference.as_batch(pair, torch.ones_like(pair.chosen_length)))


def ours(function, options, named, chosen_mask, rejected_mask):
    return function(pair_of(named, chosen_mask, rejected_mask), **options)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_agree_with_the_paper(name):
    paper, arguments, function, options = CASES[name]
    named, cm, rm = batch()
    loss, explain = ours(function, options, named, cm, rm)
    rows = []
    for b in range(B):
        own = [named[k][b][m[b]] for k, m in zip(named, [cm, rm] * 3, strict=True)]
        rows.append(paper(own[0], own[1], own[2], own[3], own[4], own[5], *arguments))
    expected = torch.stack(rows)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    weight = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.1], dtype=torch.float64)  # rows must not mix
    leaves = [named["chosen"], named["rejected"], named["chosen_kl"], named["rejected_kl"]]
    got = torch.autograd.grad((weight * loss).sum(), leaves, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad((weight * expected).sum(), leaves, allow_unused=True, materialize_grads=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all(x.shape == (B,) and not x.requires_grad for x in explain.values())
    torch.testing.assert_close(explain["margin"], explain["reward_chosen"] - explain["reward_rejected"])


def weighed(y, z, alpha):
    """2409.06411: the tokens up to the length that both answers have, and alpha times the rest; each one number."""
    n = min(len(y), len(z))
    return tuple((x[:n].sum() + alpha * sum(x[n:], x.new_zeros(()))).reshape(1) for x in (y, z))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if LOSSES_OF[case[2]].takes_ld_alpha and n != "ipo mean"]
)
def test_ld_dpo_of_every_loss_of_sums_agrees_with_the_paper(name, alpha):
    paper, arguments, function, options = CASES[name]
    named, cm, rm = batch()
    pair = pair_of(named, cm, rm, tails=True)
    found, _ = function(preference.desensitised(pair, alpha), **options)
    rows = []
    for b in range(B):
        y, z, yr, zr, ky, kz = (named[k][b][m[b]] for k, m in zip(named, [cm, rm] * 3, strict=True))
        if function is preference.wpo:  # how much answers are like the policy's own is of whole answers
            weight = torch.exp((y + ky).mean() + (z + kz).mean()).clamp(max=1).item()
            dpo = paper_dpo(*weighed(y, z, alpha), *weighed(yr, zr, alpha), ky, kz, *arguments)
            rows.append(weight * dpo)
        else:
            rows.append(paper(*weighed(y, z, alpha), *weighed(yr, zr, alpha), ky, kz, *arguments))
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    leaves = [named["chosen"], named["rejected"]]
    for a, b in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    swapped = pair.swapped()
    torch.testing.assert_close(
        preference.desensitised(swapped, alpha).chosen, preference.desensitised(pair, alpha).rejected, rtol=0, atol=0
    )
    with pytest.raises(TypeError, match="beyond the length"):
        preference.desensitised(pair_of(named, cm, rm), alpha)


def test_both_sides_of_the_kinks_are_met():
    """Otherwise the comparison above would prove half of hinge and DPOP."""
    named, cm, rm = batch()
    for name in ("slic", "rso"):
        _, _, function, options = CASES[name]
        loss, _ = ours(function, options, named, cm, rm)
        assert (loss == 0).any(), name
        assert (loss > 0).any(), name
    drop = ((named["ref_chosen"] - named["chosen"]) * cm).sum(-1)
    assert (drop > 0).any()
    assert (drop < 0).any()


@pytest.mark.parametrize("name", CASES)
def test_nothing_under_a_false_mask_matters(name):
    _, _, function, options = CASES[name]
    named, cm, rm = batch()
    masks = dict(zip(named, [cm, rm] * 3, strict=True))
    dirty = {k: torch.where(masks[k], v, torch.nan) for k, v in named.items()}
    clean, clean_explain = ours(function, options, named, cm, rm)
    spoilt, spoilt_explain = ours(function, options, dirty, cm, rm)
    assert torch.equal(clean, spoilt)
    assert all(torch.equal(clean_explain[k], spoilt_explain[k]) for k in clean_explain)
    grads = torch.autograd.grad(spoilt.sum(), list(named.values()), allow_unused=True, materialize_grads=True)
    for key, grad in zip(named, grads, strict=True):
        assert (grad[~masks[key]] == 0).all(), key
        assert grad.isfinite().all(), key


@pytest.mark.parametrize("name", CASES)
def test_extreme_logps_stay_finite(name):
    _, _, function, options = CASES[name]
    tensors = [
        torch.tensor(x, requires_grad=True)
        for x in ([-5000.0, -1e-9, 0.0, -3.0], [-1e-9, -5000.0, 0.0, -4000.0], [-2.0] * 4, [-2.0] * 4)
    ]
    kl = torch.tensor([4000.0, 0.0, 0.0, 1.0])
    length = torch.tensor([100.0, 1.0, 0.0, 7.0])
    pair = preference.PairLogp(tensors[0], tensors[1], length, length, tensors[2], tensors[3], kl, kl, log_weight=-kl)
    loss, _ = function(pair, **options)
    grads = torch.autograd.grad(loss.sum(), tensors[:2])
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", [n for n, entry in LOSSES.items() if entry.data == "pair" and entry.needs_reference])
def test_which_losses_take_differences_alone(name):
    """A reference that is known up to a number per prompt serves these, and no other."""
    named, cm, rm = batch()
    pair = pair_of(named, cm, rm)
    shift = torch.linspace(0.7, 2.0, B, dtype=torch.float64)
    moved = pair._replace(ref_chosen=pair.ref_chosen + shift, ref_rejected=pair.ref_rejected + shift)
    moved = moved._replace(batch=preference.as_batch(moved, torch.ones_like(shift)))
    before, after = (LOSSES[name].function(p)[0] for p in (pair, moved))
    assert LOSSES[name].only_differences == torch.allclose(before, after, rtol=1e-9, atol=0) or name.startswith(
        "tdpo"
    )


def test_log_odds_at_both_ends():
    logp = torch.tensor([-1e-12, -1e-6, -0.5, -50.0], dtype=torch.float64)
    expected = [math.log(1e12), math.log(1e6), math.log(math.exp(-0.5) / (1 - math.exp(-0.5))), -50.0]
    torch.testing.assert_close(
        preference.log_odds(logp), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_relations_between_the_losses():
    named, cm, rm = batch()
    run = lambda f, **options: ours(f, options, named, cm, rm)[0]  # noqa: E731
    torch.testing.assert_close(run(preference.dpop, beta=0.3, penalty=0.0), run(preference.dpo, beta=0.3))
    torch.testing.assert_close(run(preference.tdpo2, beta=0.3, alpha=0.0), run(preference.dpo, beta=0.3))
    torch.testing.assert_close(run(preference.tdpo2, beta=0.3, alpha=1.0), run(preference.tdpo1, beta=0.3))
    torch.testing.assert_close(run(preference.robust_dpo, beta=0.3, flip=0.0), run(preference.dpo, beta=0.3))
    whole = run(preference.cpo, beta=0.3) - run(preference.cpo, beta=0.3, nll_weight=0.0)
    torch.testing.assert_close(whole, -(named["chosen"] * cm).sum(-1))
    per_token = run(preference.cpo, length_normalised_nll=True) - run(preference.cpo, nll_weight=0.0)
    torch.testing.assert_close(per_token, -(named["chosen"] * cm).sum(-1) / cm.sum(-1))
    pair = preference.pair_logp(AnswerLogp(named["chosen"], cm), AnswerLogp(named["rejected"], rm))
    torch.testing.assert_close(preference.chosen_nll(pair), per_token)


def test_robust_dpo_is_unbiased_under_flips():
    """Flip a share eps of labels: the expected loss is DPO's on the clean ones."""
    named, cm, rm = batch()
    swapped = {
        k: named[k.replace("chosen", "?").replace("rejected", "chosen").replace("?", "rejected")] for k in named
    }
    kept, _ = ours(preference.robust_dpo, {"beta": 0.3, "flip": 0.2}, named, cm, rm)
    flipped, _ = ours(preference.robust_dpo, {"beta": 0.3, "flip": 0.2}, swapped, rm, cm)
    clean, _ = ours(preference.dpo, {"beta": 0.3}, named, cm, rm)
    torch.testing.assert_close(0.8 * kept + 0.2 * flipped, clean)


@pytest.mark.parametrize("name", CASES)
def test_a_soft_label_is_the_mean_over_single_votes(name):
    """Three raters of four: the loss of three votes one way and one the other, for value and gradient."""
    _, _, function, options = CASES[name]
    named, cm, rm = batch()
    pair = pair_of(named, cm, rm)
    swapped = {
        k: named[k.replace("chosen", "?").replace("rejected", "chosen").replace("?", "rejected")] for k in named
    }
    agreement = torch.tensor([0.75, 1.0, 0.0, 0.5, 0.25], dtype=torch.float64)
    loss, explain = preference.soft_labelled(lambda p: function(p, **options), pair, agreement)
    for_it, against = ours(function, options, named, cm, rm)[0], ours(function, options, swapped, rm, cm)[0]
    votes = (for_it * torch.tensor([3, 4, 0, 2, 1]) + against * torch.tensor([1, 0, 4, 2, 3])) / 4
    torch.testing.assert_close(loss, votes)
    leaves = [named["chosen"], named["rejected"]]
    for x, y in zip(*(torch.autograd.grad(v.sum(), leaves, retain_graph=True) for v in (loss, votes)), strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(explain, function(pair, **options)[1])


def paper_odpo(y, z, yr, zr, beta, delta):  # 2402.10571
    return -torch.log(sig(beta * (y.sum() - yr.sum()) - beta * (z.sum() - zr.sum()) - delta))


def test_offsets_ask_for_a_lead():
    named, cm, rm = batch()
    delta = torch.tensor([0.0, 0.3, 1.2, 2.0, 0.7], dtype=torch.float64)
    chosen = AnswerLogp(named["chosen"], cm, named["ref_chosen"])
    rejected = AnswerLogp(named["rejected"], rm, named["ref_rejected"])
    pair = preference.pair_logp(chosen, rejected)._replace(offset=delta)
    own = [[named[k][b][m[b]] for k, m in zip(list(named)[:4], [cm, rm] * 2, strict=True)] for b in range(B)]
    expected = torch.stack([paper_odpo(*x, 0.3, d) for x, d in zip(own, delta, strict=True)])
    torch.testing.assert_close(preference.dpo(pair, beta=0.3)[0], expected)
    lead = pair.chosen - pair.rejected
    torch.testing.assert_close(preference.hinge(pair)[0], (1 + delta - lead).clamp(min=0))
    simpo = preference.simpo(pair, beta=2.0, margin=0.5)[0]
    means = 2 * pair.chosen / pair.chosen_length - 2 * pair.rejected / pair.rejected_length
    torch.testing.assert_close(simpo, -torch.log(sig(means - 0.5 - delta)))
    # under the opposite label the lead is asked of the other answer
    torch.testing.assert_close(
        preference.soft_labelled(lambda p: preference.dpo(p, beta=0.3), pair, torch.zeros(B, dtype=torch.float64))[0],
        preference.dpo(pair.swapped()._replace(offset=-delta), beta=0.3)[0],
    )


@pytest.mark.parametrize("name", [name for name, entry in LOSSES.items() if entry.data == "pair"])
def test_table_says_which_losses_take_an_offset(name):
    named, cm, rm = batch()
    pair = pair_of(named, cm, rm)
    moved = LOSSES[name].function(pair._replace(offset=torch.ones(B, dtype=torch.float64)))[0]
    assert torch.equal(moved, LOSSES[name].function(pair)[0]) != LOSSES[name].takes_offset


# Single answers ---------------------------------------------------------------------------------------------


def answers(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    logp, ref = (-6 * torch.rand(2, 8, generator=g, dtype=torch.float64)).unbind()
    return logp.requires_grad_(), ref, torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()


def test_kto_agrees_with_the_paper():
    logp, ref, good = answers()
    z, beta, like, dislike = 0.7, 0.4, 1.2, 0.9
    loss, explain = feedback.kto(
        logp, ref, good, torch.tensor(z, dtype=torch.float64), beta=beta,
        desirable_weight=like, undesirable_weight=dislike,
    )  # fmt: skip
    rows = []
    for a, r, g in zip(logp, ref, good, strict=True):  # 2402.01306 (8): lambda_y - v(x, y)
        reward = torch.log(torch.exp(a) / torch.exp(r))
        rows.append(like - like * sig(beta * (reward - z)) if g else dislike - dislike * sig(beta * (z - reward)))
    expected = torch.stack(rows)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logp)[0] for x in (loss, expected)))
    torch.testing.assert_close(explain["reward"], beta * (logp - ref).detach())


def test_kto_reference_point_is_clamped_and_detached():
    logp = torch.tensor([1.0, 3.0], requires_grad=True)
    assert feedback.kto_reference_point(logp, torch.zeros(2)).item() == 2.0
    assert feedback.kto_reference_point(-logp, torch.zeros(2)).item() == 0.0
    assert not feedback.kto_reference_point(logp, torch.zeros(2)).requires_grad


def test_unpaired_apo_zero_is_the_papers_two_terms_apart():
    logp, ref, good = answers()
    loss, explain = feedback.apo_zero_unpaired(
        logp, ref, good, beta=0.4, desirable_weight=1.2, undesirable_weight=0.9
    )
    rows = []
    for a, r, g in zip(logp, ref, good, strict=True):  # 2408.06266 (7): 1 - sigma(r(w)) and sigma(r(l))
        above = sig(0.4 * torch.log(torch.exp(a) / torch.exp(r)))
        rows.append(1.2 * (1 - above) if g else 0.9 * above)
    expected = torch.stack(rows)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logp)[0] for x in (loss, expected)))
    torch.testing.assert_close(explain["reward"], 0.4 * (logp - ref).detach())


def test_bco_agrees_with_the_paper():
    logp, ref, good = answers()
    beta = 0.4
    reward = beta * (logp - ref)
    shift = ((sum(reward[good]) / 4 + sum(reward[~good]) / 4) / 2).detach()
    loss, _ = feedback.bco(logp, ref, good, shift, beta=beta)
    expected = torch.stack(
        [
            -torch.log(sig(r - shift)) if g else -torch.log(1 - sig(r - shift))
            for r, g in zip(reward, good, strict=True)
        ]
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logp, retain_graph=True)[0] for x in (loss, expected)))


def test_feedback_losses_stay_finite_at_extremes():
    logp = torch.tensor([-5000.0, 0.0, -5000.0, 0.0], requires_grad=True)
    ref, good = torch.tensor([0.0, -5000.0, -1.0, -1.0]), torch.tensor([True, True, False, False])
    for loss, _ in (
        feedback.kto(logp, ref, good, torch.tensor(0.0)),
        feedback.apo_zero_unpaired(logp, ref, good),
        feedback.bco(logp, ref, good, torch.tensor(0.0)),
    ):
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), logp)[0].isfinite().all()


# The table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_table_says_what_each_loss_needs(name):
    """Take away what the table says is not needed: nothing changes. Take away what is: it is missed."""
    spec = LOSSES[name]
    if spec.data == "feedback":
        assert {"logp", "ref_logp", "desirable"} <= set(inspect.signature(spec.function).parameters)
        return
    named, cm, rm = batch()
    pair = pair_of(named, cm, rm)
    no_kl = pair._replace(chosen_kl=None, rejected_kl=None)
    if spec.needs_full_kl:
        with pytest.raises(TypeError, match="divergences"):
            spec.function(no_kl)
    else:
        assert torch.equal(spec.function(no_kl)[0], spec.function(pair)[0])
    if spec.needs_log_weight:
        with pytest.raises(TypeError, match="policy's own"):
            spec.function(pair._replace(log_weight=None))
    else:
        assert torch.equal(spec.function(pair._replace(log_weight=None))[0], spec.function(pair)[0])
    if spec.of_batch:
        with pytest.raises(TypeError, match="whole batch"):
            spec.function(pair._replace(batch=None))
    else:
        assert torch.equal(spec.function(pair._replace(batch=None))[0], spec.function(pair)[0])
    bare = pair._replace(ref_chosen=None, ref_rejected=None)
    if spec.needs_reference:
        with pytest.raises(TypeError, match="reference"):
            spec.function(bare)
    else:
        assert spec.function(bare)[0].isfinite().all()
    longer = pair._replace(chosen_length=2 * pair.chosen_length)
    assert torch.equal(spec.function(longer)[0], spec.function(pair)[0]) != spec.length_normalised
