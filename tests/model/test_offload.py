"""What waits in a file's half precision is less while it waits, and the same when it is read."""

from __future__ import annotations

import pytest
import torch
from letter_models import letters
from tiny_models import tiny_model

from steersman.model import Policy, at_hand, bytes_to_come, keep_away
from steersman.types import Tokens


def bytes_of(model) -> int:
    return sum(x.numel() * x.element_size() for x in model.parameters())


@pytest.fixture
def tokens() -> Tokens:
    return Tokens.from_ids([[3, 4, 5], [6, 7]], [[8, 9], [10, 11, 12]])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_half_precision_wait_in_half_the_memory(half, tokens):
    policy = Policy(tiny_model("llama").to(half).float(), letters()).requires_grad_(False)
    whole, before = bytes_of(policy), policy.logp(tokens).logp
    keep_away(policy)
    assert all(p.itemsize == 2 for p in policy.parameters())
    assert bytes_of(policy) == whole // 2
    assert bytes_to_come(policy) == whole
    with at_hand(policy):
        assert bytes_of(policy) == whole
        assert bytes_to_come(policy) == 0
        assert torch.equal(policy.logp(tokens).logp, before)
    assert bytes_of(policy) == whole // 2


def test_a_weight_of_other_numbers_waits_as_it_is(tokens):
    model = tiny_model("llama").bfloat16().float()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 0.1
    policy = Policy(model, letters()).requires_grad_(False)
    head, before = policy.head().weight, policy.logp(tokens).logp
    whole = bytes_of(policy)
    keep_away(policy)
    assert policy.head().weight.data_ptr() == head.data_ptr()
    assert bytes_to_come(policy) == whole - head.nbytes
    with at_hand(policy):
        assert torch.equal(policy.logp(tokens).logp, before)
