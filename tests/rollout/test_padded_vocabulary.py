"""Ids with which a model's vocabulary is padded beyond its tokenizer are never sampled, and training knows."""

from __future__ import annotations

import pytest
from letter_models import LETTERS, letters
from tiny_models import tiny_model

from steersman.model import Policy
from steersman.rollout import Engine, Sampling
from steersman.train.experience import behaviour_logp, tokens_of
from steersman.types import Prompt

PADDING = [*range(len(LETTERS), 2 * len(LETTERS))]
CUTS = [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"min_new_tokens": 3}]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cut", CUTS)
def test_padding_is_never_sampled_and_the_first_ratio_is_one(family, cut):
    policy = Policy(tiny_model(family, vocab=2 * len(LETTERS)), letters())
    prompts = [Prompt([5, 3 + i], "", index=i) for i in range(8)]
    samples = Engine(policy.model, policy.tokenizer).generate(
        prompts, Sampling(8, **cut), n=4, seed=1, record_support=True
    )
    assert max(v for s in samples for v in s.ids) < len(LETTERS)
    # what is recorded of a token is never longer than half the vocabulary: real ones have 250,000 ids
    assert all(len(ids) <= len(LETTERS) + 1 for s in samples for ids in s.support)
    if not cut:
        assert all([~i for i in ids.tolist()] == PADDING for s in samples for ids in s.support)
    tokens = tokens_of(samples)
    logp = policy.logp(tokens).logp.detach()
    assert (logp - behaviour_logp(samples, tokens.mask.shape[1])).abs().max() < 1e-4
