"""What the attention of models does itself, and what it leaves to torch."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from steersman import native
from steersman.model.fast.attention import attention
from steersman.model.fast.plain import plain_layers
from steersman.native import decode, sequences

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")

MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=2)
ENCODER = SimpleNamespace(is_causal=False, num_key_value_groups=2)


def some(queries: int, keys: int, width: int = 16, dtype=torch.float32):
    random = torch.Generator().manual_seed(queries + keys)
    shapes = ((2, 4, queries, width), (2, 2, keys, width), (2, 2, keys, width))
    return [torch.randn(shape, generator=random, dtype=dtype) for shape in shapes]


@pytest.fixture
def taken(monkeypatch):
    """Which compiled attention was called."""
    seen: list[str] = []
    for room, name in ((decode, "decode_attention"), (sequences, "attend")):
        inner = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *args, inner=inner, name=name: (seen.append(name), inner(*args))[1])
    return seen


def additive(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).index_fill(-1, torch.tensor([0, 2]), -torch.inf)


def check(module, given, mask, expected: str | None, taken, **settings) -> None:
    out, _ = attention(module, *given, mask, **settings)
    assert taken == ([] if expected is None else [expected])
    torch.testing.assert_close(out, sdpa_attention_forward(module, *given, mask, **settings)[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("queries", "keys", "mask", "expected"),
    [
        (1, 9, None, "decode_attention"),
        (1, 9, additive(2, 1, 1, 9), "decode_attention"),
        (1, 9, additive(2, 4, 1, 9), None),  # heads apart
        (7, 7, None, "attend"),
        (7, 9, torch.ones(2, 1, 7, 9).bool().tril(2), "attend"),
        (7, 9, torch.ones(1, 1, 7, 9).bool().tril(2).expand(2, -1, -1, -1), "attend"),
        (7, 9, additive(2, 1, 7, 9), None),  # no mask of yes and no
    ],
)
def test_who_does_it(queries, keys, mask, expected, taken):
    check(MODULE, some(queries, keys), mask, expected, taken, scaling=0.3, dropout=0.0, sliding_window=None)


def test_what_is_left_to_torch(taken):
    check(ENCODER, some(7, 7), None, None, taken)
    check(MODULE, some(7, 7), None, None, taken, is_causal=False)
    check(MODULE, some(7, 7, dtype=torch.float64), None, None, taken)
    check(MODULE, some(7, 7, width=8), None, None, taken)
    query, key, value = some(1, 9)
    check(MODULE, (query, key.transpose(2, 3).contiguous().transpose(2, 3), value), None, None, taken)
    check(MODULE, (query.requires_grad_(), key, value), None, None, taken)  # it has no gradient
    with plain_layers():
        check(MODULE, some(7, 7), None, None, taken)
    with suppress(ValueError):  # newer transformers refuse it, older ones read past it
        attention(MODULE, *some(7, 7), None, softcap=30.0)
    attention(MODULE, *some(7, 7), None, dropout=0.1)
    attention(MODULE, *some(7, 7), None, position_bias=torch.zeros(2, 4, 7, 7))
    assert taken == []
