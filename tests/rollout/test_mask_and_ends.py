"""NLPO's mask and the end of a response: it can always end, and a minimum length never empties the mask."""

from __future__ import annotations

import pytest
import torch
from tiny_models import allowed_ids, tiny_model

from steersman.rollout import Engine, Sampling
from steersman.rollout.sampling import ActionLimit
from steersman.types import Prompt

ENDS = [2, 5]


def leaning(to: list[int], by: float):
    """A model whose next token hardly depends on what came before: `to` has `by` nats more than the rest."""
    model = tiny_model("gpt2", vocab=12)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[to] = by / model.config.n_embd
    return model


def test_an_end_token_outside_the_nucleus_stays_allowed():
    model, mask = leaning([2], 2.0), leaning([7, 8], 20.0)
    prompts = [Prompt([3], "", index=i) for i in range(16)]
    samples = Engine(model, eos_token_id=ENDS).generate(
        prompts, Sampling(6, limit=ActionLimit(mask, 0.5, 2)), seed=1, record_support=True
    )
    assert {tuple(ids.tolist()) for s in samples for ids in s.support} == {(2, 5, 7, 8)}
    assert sum(s.finish == "eos" for s in samples) > 8


@pytest.mark.parametrize("minimum", [1, 2])
def test_a_nucleus_of_end_tokens_only_below_the_minimum_length(minimum):
    model = leaning(ENDS, 20.0)
    samples = Engine(model, eos_token_id=ENDS).generate(
        [Prompt([3], "", index=i) for i in range(8)],
        Sampling(6, min_new_tokens=2, limit=ActionLimit(model, 0.9, minimum)), seed=1, record_support=True,
    )  # fmt: skip
    for s in samples:
        assert len(s.ids) == 3
        assert s.finish == "eos"
        assert not {2, 5} & {*s.ids[:2]}
        assert all(len(allowed_ids(ids, 12)) >= minimum for ids in s.support)
