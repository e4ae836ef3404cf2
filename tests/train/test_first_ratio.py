"""Before the first update the ratio is 1, and the gradient is the score function's (invariant 1)."""

from __future__ import annotations

import pytest
import torch
from letter_models import LETTERS, letters
from tiny_models import FAMILIES, allowed_ids, tiny_model

from steersman.advantage.gae import Advantage
from steersman.algorithms import ALGORITHMS, Coefficients
from steersman.model import Policy
from steersman.rollout import Engine, Sampling
from steersman.train.experience import tokens_of, trajectory
from steersman.train.policy_update import LanguageBatch, Learner
from steersman.types import Prompt
from steersman.update.optimizer import Optimizer, OptimizerConfig

PROMPTS = [[5], [7, 3, 9, 30, 11, 4, 8, 21, 6], [12, 2, 2], [3] * 14, [33, 20]]
CASES = [(0.7, {}), (1.3, {}), (1.0, {"top_p": 0.9}), (0.7, {"top_p": 0.9, "top_k": 12, "min_new_tokens": 2})]


def sampled(family: str, temperature: float, cut: dict, n: int = 3):
    policy = Policy(tiny_model(family, vocab=len(LETTERS), scale=2.0), letters())
    # six sequences side by side while fifteen are asked for: they leave and enter in the middle
    engine = Engine(policy.model, policy.tokenizer, max_batch=6, eos_token_id=[2, 5, 17])
    prompts = [Prompt(ids, "", index=i) for i, ids in enumerate(PROMPTS)]
    sampling = Sampling(max_new_tokens=11, temperature=temperature, **cut)
    return policy, engine.generate(prompts, sampling, n=n, seed=5, record_support=True)


def score_function_gradient(model, samples, adv, temperature: float) -> list[torch.Tensor]:
    """grad of -sum_t A_t log pi(a_t) / tokens, row by row, unpadded, by plain autograd over the model's logits."""
    total = torch.zeros(())
    for row, sample in enumerate(samples):
        logits = model(torch.tensor([sample.prompt.ids + sample.ids])).logits[0, len(sample.prompt.ids) - 1 : -1]
        logits = logits / temperature
        for t, token in enumerate(sample.ids):
            kept = logits[t][sorted(allowed_ids(sample.support[t], logits.shape[1]))] if sample.support else logits[t]
            total = total - adv[row, t] * (logits[t, token] - kept.logsumexp(0))
    return list(torch.autograd.grad(total / sum(len(s.ids) for s in samples), list(model.parameters())))


@pytest.mark.parametrize(
    "family", [f if f in ("gpt2", "llama", "qwen2") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
@pytest.mark.parametrize(("temperature", "cut"), CASES)
def test_the_first_ratio_is_one_and_the_gradient_is_reinforces(family, temperature, cut):
    policy, samples = sampled(family, temperature, cut)
    assert len({len(s.ids) for s in samples}) > 2
    if cut:
        assert all(s.support is not None for s in samples)
    tokens = tokens_of(samples)
    algorithm = ALGORITHMS["ppo"](beta=0.0, epochs=1, minibatches=1)
    traj = trajectory(samples, tokens, torch.zeros(len(samples)), algorithm)
    adv = torch.where(traj.mask, torch.randn(traj.mask.shape, generator=torch.Generator().manual_seed(1)), 0.0)
    learner = Learner(
        algorithm, policy, Optimizer(policy.parameters(), OptimizerConfig(), 1), temperature=temperature,
        micro_tokens=40,
    )  # fmt: skip
    batch = LanguageBatch(learner, tokens, traj, Advantage(adv), Coefficients())
    batch.gradients(torch.arange(len(samples)), actor=True, first=True)
    got = [p.grad.clone() for p in policy.model.parameters()]
    expected = score_function_gradient(policy.model, samples, adv, temperature)
    tally = batch.tally
    assert tally.means()["ratio_gap"] < 2e-4
    assert tally.means()["kl/old"] < 1e-6
    assert tally.means()["clip_fraction"] == 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5 * max(1.0, float(b.abs().max())))
    for p in policy.parameters():
        p.grad = None
    stats = learner.update(tokens, traj, Advantage(adv), Coefficients(), torch.Generator().manual_seed(0))
    assert stats["ratio_gap"] < 2e-4


def test_a_wrong_temperature_shows_as_a_gap():
    policy, samples = sampled("llama", 0.7, {})
    tokens, algorithm = tokens_of(samples), ALGORITHMS["rloo"](beta=0.0)
    traj = trajectory(samples, tokens, torch.zeros(len(samples)), algorithm)
    learner = Learner(algorithm, policy, Optimizer(policy.parameters(), OptimizerConfig(), 1), temperature=1.0)
    stats = learner.update(tokens, traj, Advantage(traj.reward), Coefficients(), torch.Generator())
    assert stats["ratio_gap"] > 0.05
