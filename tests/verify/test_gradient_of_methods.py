"""Invariant 8: every method's expected gradient, by enumeration, is the exact one or is off by what it says."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache

import pytest
import torch

from steersman.algorithms import ALGORITHMS, Coefficients
from steersman.algorithms.base import Algorithm
from steersman.tabular.oracle import exact_gradient, expected_gradient, relative_deviation
from steersman.tabular.token_mdp import TokenMDP
from steersman.types import Trajectory
from steersman.verify import gradient

GROUPS = ("dr-grpo", "dapo", "gspo", "cispo", "gmpo", "sapo", "dppo", "gpg", "clip-cov", "kl-cov", "luspo", "vespo")
SIZE_OF_BIAS = {
    # name: (largest relative deviation, cosine with the exact gradient) on `gradient.example()`
    "reinforce++": (0.7322, 0.9687),
    "trpo": (0.6336, 0.9506),
    "ppo": (0.6336, 0.9506),
    "ppo-kl": (0.6336, 0.9506),
    "nlpo": (0.6369, 0.9515),
    "grpo": (0.8461, 0.6749),
    "dr-grpo": (0.5, 1.0),
    "dapo": (0.6733, 0.7968),
    "gspo": (0.6215, 0.7593),
    "cispo": (0.6733, 0.7968),
    "reinforce++-baseline": (0.7685, 0.6718),
    "gmpo": (0.6215, 0.7593),
    "sapo": (0.6215, 0.7593),
    "dppo": (0.6733, 0.7968),
    "luspo": (0.5228, 0.7729),
    "vespo": (0.6733, 0.7968),
    "gpg": (0.7767, 0.9933),
    "gdpo": (0.8269, 0.8246),
    "gfpo": (0.6733, 0.7968),
    "clip-cov": (0.6733, 0.7968),
    "kl-cov": (0.6733, 0.7968),
    "pass-at-k": (0.3431, 0.9636),
    "vc-ppo": (0.6336, 0.9506),
    "vapo": (0.7530, 0.6440),
}


@cache
def checked(name: str) -> gradient.GradientCheck:
    return gradient.check_gradient(ALGORITHMS[name](), *gradient.example())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_core_is_exact_and_what_is_shipped_is_exact_unless_it_names_a_bias(name):
    found = checked(name)
    assert found.core < 1e-8
    assert (found.shipped < 1e-8) == (ALGORITHMS[name].bias == "")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_size_of_each_bias(name):
    deviation, cosine = SIZE_OF_BIAS.get(name, (0.0, 1.0))
    assert checked(name).shipped == pytest.approx(deviation, abs=5e-4)
    assert checked(name).cosine == pytest.approx(cosine, abs=5e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_dr_grpo_is_off_by_one_part_in_the_group(size):
    mdp = TokenMDP.random(2, 2, 0.4, seed=1, prompts=2)
    logits = torch.linspace(-1, 1, mdp.next_state.numel(), dtype=torch.float64).reshape(mdp.next_state.shape)
    found = gradient.check_gradient(ALGORITHMS["dr-grpo"](), mdp, logits, size=size)
    assert found.shipped == pytest.approx(1 / size, rel=1e-10)
    assert found.core < 1e-10


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_dividing_by_a_random_length_is_a_bias(average):
    algorithm = ALGORITHMS["reinforce"](average=average)
    assert gradient.check_gradient(algorithm, *gradient.example()).shipped > 0.1


def test_one_step_of_gae_leans_on_the_critic():
    assert gradient.check_gradient(ALGORITHMS["a2c"](lam=0.5), *gradient.example()).shipped > 0.1


def test_nlpo_without_its_other_biases_has_the_exact_gradient_of_the_masked_policy():
    class MaskedOnly(ALGORITHMS["nlpo"]):
        """NLPO whose mask is named otherwise, so that `unbiased` leaves it on."""

    off = {k: v for k, v in gradient.OFF.items() if k in MaskedOnly.model_fields and k != "mask_top_p"}
    mdp, logits = gradient.example()
    algorithm = MaskedOnly(**off, mask_top_p=0.7)
    assert gradient.masked(algorithm, logits, mdp.eos).isinf().any()
    assert gradient.check_gradient(algorithm, mdp, logits).shipped < 1e-8


def tiny_gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=3, n_positions=4, n_embd=4, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    for p in model.parameters():
        p.data.mul_(4) if p.ndim > 1 else None
    return model


@pytest.mark.parametrize("name", ["reinforce", "rloo", "a2c", "ppo", "nlpo", "gspo"])
def test_through_a_transformer(name):
    mdp, model = TokenMDP.random(3, 2, 0.5, seed=4, prompts=2), tiny_gpt2()
    found = gradient.check_gradient(ALGORITHMS[name](), mdp, lambda: mdp.logits_of(model), list(model.parameters()))
    assert found.core < 1e-8
    assert (found.shipped < 1e-8) == (ALGORITHMS[name].bias == "")


@pytest.mark.parametrize("name", ["reinforce", "reinforce-baseline", "rloo", "remax", "a2c", "a2po"])
def test_unbiased_over_several_prompts(name):
    mdp = TokenMDP.random(3, 2, 0.5, seed=5, prompts=2, per_token=True, cut="terminate")
    logits = torch.sin(torch.arange(mdp.next_state.numel(), dtype=torch.float64)).reshape(mdp.next_state.shape)
    assert gradient.check_gradient(ALGORITHMS[name](), mdp, logits).shipped < 1e-8


def with_junk(x: torch.Tensor | None, fill: float) -> torch.Tensor | None:
    """One more column after the first, and one more at the end."""
    if x is None or x.ndim == 1:
        return x
    junk = torch.full_like(x[:, :1], fill)
    return torch.cat([x[:, :1], junk, x[:, 1:], junk], 1)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_nothing_under_a_false_mask_reaches_advantage_or_loss(name):
    """A hole after the first token (another's turn in a dialogue) and padding, full of large numbers."""
    mdp, logits = gradient.example()
    algorithm = ALGORITHMS[name](beta=0.3, gamma=0.9)
    traj = mdp.trajectory(logits, gamma=0.9, kl=False, value=gradient.arbitrary_critic(mdp))
    traj.group, traj.baseline = torch.arange(len(mdp)) // 3, torch.full((len(mdp),), 0.2, dtype=torch.float64)
    holed = {f.name: with_junk(getattr(traj, f.name), 50.0) for f in fields(traj)}
    holed["mask"] = with_junk(traj.mask, False)
    junk = Trajectory(**holed)
    logp = (traj.logp_old + 0.1 * torch.sin(torch.arange(traj.logp_old.numel()).reshape(traj.mask.shape))).detach()
    coef = Coefficients(0.3, 1.0)
    a, b = algorithm.advantage(traj), algorithm.advantage(junk)
    assert (b.adv[~junk.mask] == 0).all()
    torch.testing.assert_close(a.adv[traj.mask], b.adv[junk.mask])
    if a.ret is not None:
        torch.testing.assert_close(a.ret[traj.mask], b.ret[junk.mask])
    one, two = logp.clone().requires_grad_(), with_junk(logp, -3.0).requires_grad_()
    losses = [gradient.loss_given(algorithm, x.adv, y, t, coef) for x, y, t in ((a, one, traj), (b, two, junk))]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(one.grad[traj.mask], two.grad[junk.mask])
    assert (two.grad[~junk.mask] == 0).all()


# Where a method comes to rest --------------------------------------------------------------------------------


def shipped_gradient(algorithm: Algorithm, mdp: TokenMDP, logits: torch.Tensor) -> float:
    loss = gradient.batch_loss(algorithm, mdp, logits)
    size, count = (2, 1) if algorithm.group else (1, 2)
    found = expected_gradient(
        mdp, logits, loss, size=size, count=count, kl=algorithm.kl_in == "reward", stacked=False
    )
    return float(found.abs().max())


@pytest.mark.parametrize("name", ["reinforce", "reinforce-baseline", "a2c", "rloo", "remax", "a2po", *GROUPS])
def test_the_optimum_is_a_place_of_rest(name):
    """However the advantages are scaled and averaged, at pi* there is nothing to compare."""
    mdp = TokenMDP.random(3, 2, 0.5, seed=6)
    algorithm = ALGORITHMS[name](beta=mdp.beta)
    assert shipped_gradient(algorithm, mdp, mdp.pi_star()) < 1e-10
    assert shipped_gradient(algorithm, mdp, mdp.logp_ref) > 1e-2


def test_grpo_rests_where_the_paper_s_terms_balance():
    """One-token answers, groups of two: pi(a) g(a) + beta (ref(a) - pi(a)) = 0, g(a) the mean standardised lead."""
    mdp = TokenMDP.random(4, 1, 0.9, seed=3)
    ref, score = mdp.logp_ref[0].exp(), mdp.total_reward[mdp.ending[0]]
    lead = score[:, None] - score[None, :]
    standard = (lead / 2) / (lead.abs() / 2**0.5 + 1e-4)
    pi = ref
    for _ in range(3000):
        pi = 0.5 * pi + 0.5 * mdp.beta * ref / (mdp.beta - standard @ pi)
        pi = pi / pi.sum()
    grpo = ALGORITHMS["grpo"](beta=mdp.beta)
    assert shipped_gradient(grpo, mdp, pi.log()[None]) < 1e-10
    assert shipped_gradient(grpo, mdp, mdp.pi_star()) > 1e-2
    gap = float(mdp.j_star() - mdp.objective(pi.log()[None]))
    assert 0.01 < gap < float(mdp.j_star() - mdp.objective(mdp.logp_ref))


def test_noise_of_the_penalty_is_not_blown_up_where_scores_are_equal():
    mask = torch.ones(4, 2, dtype=torch.bool)
    reward = torch.tensor([[0.01, 1.0], [-0.02, 1.0], [0.03, 0.0], [0.0, 1.0]])
    traj = Trajectory(
        mask, reward, torch.ones(4, 2), torch.zeros(4, 2),
        group=torch.tensor([0, 0, 1, 1]), score=torch.tensor([1.0, 1.0, 0.0, 1.0]),
    )  # fmt: skip
    adv = ALGORITHMS["gspo"]().advantage(traj).adv
    assert adv[:2].abs().max() == 0
    deviation = 0.5**0.5 + 1e-4
    torch.testing.assert_close(adv[2:, 0], torch.tensor([-0.485, 0.485]) / deviation)
    plain = ALGORITHMS["dr-grpo"]().advantage(traj).adv
    torch.testing.assert_close(plain[:2, 0], torch.tensor([0.015, -0.015]))


# Samples of another policy: ratios away from 1 ----------------------------------------------------------------

CLIPPED = (
    "reinforce++", "ppo", "nlpo", "grpo", "dr-grpo", "dapo", "reinforce++-baseline", "gdpo", "gfpo", "clip-cov",
    "vc-ppo", "vapo",
)  # fmt: skip


def transcription(name: str, a: Algorithm, ratio: list[float], logp: list[float], adv: float) -> list[float]:
    """The papers' losses for one answer with one advantage, in plain numbers."""
    out = []
    mean = torch.tensor(ratio).log().mean().exp().item()
    for rho, lp in zip(ratio, logp, strict=True):
        sign = 1 if adv > 0 else -1
        if name in CLIPPED:
            out.append(-min(rho * adv, min(max(rho, 1 - a.clip_low), 1 + a.clip_high) * adv))
        elif name in ("gspo", "luspo"):
            out.append(-min(mean * adv, min(max(mean, 1 - a.clip_low), 1 + a.clip_high) * adv))
        elif name == "cispo":
            out.append(-min(rho, 5.0) * adv * lp)
        elif name in ("trpo", "kl-cov"):
            out.append(-rho * adv)
        elif name == "gmpo":
            logs = [torch.tensor(x).log().item() for x in ratio]
            kept = [sign * min(sign * d, sign * min(max(d, -0.4), 0.4)) for d in logs]
            out.append(-adv * torch.tensor(sum(kept) / len(kept)).exp().item())
        elif name == "sapo":
            tau = 1.0 if adv > 0 else 1.05
            out.append(-adv * 4 / tau / (1 + math.exp(-tau * (rho - 1))))
        elif name == "dppo":
            outside = abs(math.exp(lp) - math.exp(lp) / rho) > 0.15 and (rho > 1) == (adv > 0)
            out.append(0.0 if outside else -min(rho, 10.0) * adv * lp)
        elif name == "vespo":
            whole, (k, lam) = math.prod(ratio), (2.0, 3.0) if adv > 0 else (3.0, 2.0)
            out.append(-(whole**k) * math.exp(lam * (1 - whole)) * adv * lp)
        elif name == "a2po":
            reference = [x - 0.3 for x in logp]
            out.append((0.2 * (sum(logp) - sum(reference)) - adv) ** 2)
        elif name == "ppo-kl":
            out.append(-rho * adv + 1.0 * (rho - 1 - torch.tensor(rho).log().item()))
        else:
            out.append(-adv * lp)
    return out


@pytest.mark.parametrize("adv", [0.7, -1.3])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_losses_away_from_the_policy_that_sampled(name, adv):
    torch.set_default_dtype(torch.float64)
    try:
        logp = torch.tensor([-1.0, -0.3, -2.2, -0.9, -0.1])
        ratio = torch.tensor([0.5, 0.9, 1.25, 7.0, 1.1])
        mask = torch.ones(1, 5, dtype=torch.bool)
        traj = Trajectory(mask, torch.zeros(1, 5), torch.ones(1, 5), (logp - ratio.log())[None], logp[None] - 0.3)
        algorithm = ALGORITHMS[name]()
        found = algorithm.loss(logp[None], traj, torch.full((1, 5), adv), Coefficients(0.2, beta_old=1.0))
        expected = transcription(name, algorithm, ratio.tolist(), logp.tolist(), adv)
        torch.testing.assert_close(found[0], torch.tensor(expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_step_from_another_policy_s_samples_is_exact_for_the_unclipped_surrogate():
    """On one-token answers an importance-weighted surrogate at new logits is J itself."""
    mdp = TokenMDP.random(5, 1, seed=8)
    logits = torch.linspace(-1, 1, 5, dtype=torch.float64)[None]

    def loss(batch):
        return ALGORITHMS["trpo"]().loss(batch.logp, batch.trajectory, batch.trajectory.reward, Coefficients())

    found = expected_gradient(mdp, logits, loss, behaviour=mdp.logp_ref)
    assert relative_deviation(found, -exact_gradient(mdp, logits)) < 1e-12
