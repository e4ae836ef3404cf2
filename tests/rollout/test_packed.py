"""Rearranged weights change no draw beyond rounding, stand aside for many rows, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from steersman import native
from steersman.rollout import Engine, Sampling
from steersman.rollout.fast import packed as room
from steersman.rollout.fast.packed import packed, pays
from steersman.types import Prompt

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")


def given(count: int) -> list[Prompt]:
    return [Prompt([1 + i % 7, 5, 3 + i % 11], "", index=i) for i in range(count)]


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "t5", "bart"])
def test_the_same_samples_with_the_same_log_probabilities(family, monkeypatch):
    model = tiny_model(family)
    calls = []
    inner = room._linear
    monkeypatch.setattr(room, "_linear", lambda *args: calls.append(1) or inner(*args))
    found = Engine(model, max_batch=16).generate(given(20), Sampling(40), seed=3)
    assert calls
    monkeypatch.setattr(room, "STEPS", 1 << 30)
    plain = Engine(model, max_batch=16).generate(given(20), Sampling(40), seed=3)
    assert [s.ids for s in found] == [s.ids for s in plain]
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=5e-6, rtol=2e-5)


def test_layers_give_what_they_gave_and_are_put_back_even_after_an_error(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8, bias=False))
    x = torch.randn(16, 1, 24, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(room, "ROWS", 8)
    with torch.inference_mode():
        expected, few = model(x), model(x[:3])
        with packed(model):
            assert all("forward" in vars(layer) for layer in model)
            torch.testing.assert_close(model(x[:3]), few, atol=1e-6, rtol=1e-5)
            assert torch.equal(model(x), expected)
        with pytest.raises(RuntimeError), packed(model):
            model(x[..., :3])
    assert not any("forward" in vars(layer) for layer in model)


def test_where_it_does_not_pay_nothing_is_touched(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(24, 40))
    monkeypatch.setattr(room, "STEPS", 32)
    assert pays(model, 32)
    assert not pays(model, 31)
    monkeypatch.setattr(room, "BYTES", 100)
    assert not pays(model, 32)
    double = torch.nn.Sequential(torch.nn.Linear(24, 40)).double()
    with packed(double):
        assert "forward" not in vars(double[0])
