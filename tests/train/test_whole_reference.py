"""KL takes the policy as it is sampled from and the reference whole (arXiv 1909.08593, eq. 2), by enumeration."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from letter_models import LETTERS, letters
from tiny_models import allowed_ids, tiny_model
from train_kit import recipe

from steersman.data import Batches
from steersman.model import Policy
from steersman.rollout import Engine, Sampling
from steersman.rollout.sampling import ActionLimit
from steersman.tabular.token_mdp import TokenMDP
from steersman.train.on_policy import OnPolicy
from steersman.train.roles import build_roles
from steersman.types import Prompt, Sample
from steersman.verbs.rl import RewardLooks

ENDS = [2, 5]
CUTS = {
    "nlpo": ({}, (0.3, 2)),
    "top_p": ({"top_p": 0.3}, ()),
    "top_k": ({"top_k": 4}, ()),
    "min_p": ({"min_p": 0.4}, ()),
    "min_new_tokens": ({"min_new_tokens": 2}, ()),
}


@torch.no_grad()
def exact(model, prompt: list[int], samples: list[Sample]) -> tuple[float, float]:
    """KL (nats per response) and perplexity of the samples from the recorded sets, in float64, token by token.

    Policy and reference are one model, so the log-ratio of a token is -log of the reference's mass on its set.
    """
    kl, logp, count = 0.0, 0.0, 0
    for s in samples:
        z = model(torch.tensor([prompt + s.ids])).logits[0, len(prompt) - 1 : -1].double()
        p = z.softmax(-1)
        for t, token in enumerate(s.ids):
            kl -= math.log(float(p[t, sorted(allowed_ids(s.support[t], p.shape[1]))].sum())) / len(samples)
            logp, count = logp + math.log(float(p[t, token])), count + 1
    return kl, math.exp(-logp / count)


@pytest.mark.parametrize("cut", CUTS)
@torch.no_grad()
def test_kl_and_perplexity_of_a_truncated_policy_beside_itself_whole(cut):
    settings, mask = CUTS[cut]
    policy = Policy(tiny_model("llama", vocab=len(LETTERS), scale=2.0), letters())
    engine = Engine(policy.model, policy.tokenizer, eos_token_id=ENDS)
    prompt, limit = [7, 3, 9], ActionLimit(policy.model, *mask) if mask else None
    samples = engine.generate(
        [Prompt(prompt, "", index=0)], Sampling(max_new_tokens=4, limit=limit, **settings), n=64, seed=1,
        record_support=True,
    )  # fmt: skip
    kl, perplexity = exact(policy.model, prompt, samples)
    assert kl > 0.05

    asked: Any = SimpleNamespace(rollout=SimpleNamespace(temperature=1.0))
    roles: Any = SimpleNamespace(reference=policy, device=policy.device)
    found = RewardLooks(roles, [], asked)._distance(roles.reference, samples)
    assert found["held_out/kl"] == pytest.approx(kl, rel=1e-4)
    assert found["held_out/perplexity"] == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("nlpo", {"algorithm__mask_top_p": 0.5}),
        ("grpo", {"rollout__top_p": 0.5}),
        ("ppo", {"rollout__top_k": 4, "rollout__recompute_logp": True}),
    ],
)
def test_the_penalty_and_the_logged_kl_see_what_was_cut_away(base, name, settings):
    asked = recipe(name, base, **settings)
    prompts = [Prompt([3 + i], "", index=i) for i in range(12)]
    roles = build_roles(asked, torch.device("cpu"))
    state = OnPolicy(asked, roles, prompts, Batches(12, asked.rollout.prompts, asked.run.seed, drop_last=True))
    samples, scores = state.sample(state.next_prompts())
    tokens, traj, _ = state.experience(samples, scores)
    expected = sum(exact(roles.policy.model, s.prompt.ids, [s])[0] for s in samples) / len(samples)
    assert expected > 0.1
    assert state.observe(samples, scores, tokens, traj, None)["kl"] == pytest.approx(expected, rel=1e-4)
    assert traj.logp_ref is not None
    gap = torch.where(tokens.mask, traj.logp_old - traj.logp_ref, 0.0)
    assert (gap >= -1e-5).all()  # policy and reference are one model, so a cut can only raise a token's probability


def test_the_token_mdp_sees_a_masked_policy_beside_the_whole_reference():
    mdp = TokenMDP.random(3, 3, 0.5, seed=2)
    allowed = torch.rand(mdp.logp_ref.shape, generator=torch.Generator().manual_seed(4)) < 0.6
    allowed[:, mdp.eos] = True
    masked = torch.log_softmax(mdp.logp_ref.masked_fill(~allowed, -torch.inf), -1)
    total = 0.0
    for row, n in zip(mdp.sequences, mdp.length.tolist(), strict=True):
        state, p, q = 0, 1.0, 1.0
        for token in row[:n].tolist():
            p, q = p * math.exp(masked[state, token]), q * math.exp(mdp.logp_ref[state, token])
            state = int(mdp.next_state[state, token])
        total += p * math.log(p / q) if p > 0 else 0.0
    assert total > 0.1
    assert float(mdp.kl(masked)) == pytest.approx(total, abs=1e-12)
