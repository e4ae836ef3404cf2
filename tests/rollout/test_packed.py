"""Rearranged weights change no draw beyond rounding, stand aside for other sizes, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from steersman.rollout import Engine, Sampling
from steersman.rollout import packed as room
from steersman.rollout.packed import packed
from steersman.types import Prompt

pytestmark = pytest.mark.skipif(not room._available(), reason="no MKL, or no compiled loops")


def given(count: int) -> list[Prompt]:
    return [Prompt([1 + i % 7, 5, 3 + i % 11], "", index=i) for i in range(count)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "t5"])
def test_the_same_samples_with_the_same_log_probabilities(family, monkeypatch):
    model = tiny_model(family)
    calls = []
    inner = room._linear
    monkeypatch.setattr(room, "_linear", lambda *args: calls.append(1) or inner(*args))
    found = Engine(model, max_batch=16).generate(given(20), Sampling(40), seed=3)
    assert calls
    monkeypatch.setattr(room, "ROWS", 1 << 30)
    plain = Engine(model, max_batch=16).generate(given(20), Sampling(40), seed=3)
    assert [s.ids for s in found] == [s.ids for s in plain]
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=2e-6, rtol=1e-5)


def test_layers_give_what_they_gave_and_are_put_back_even_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8, bias=False))
    x = torch.randn(16, 1, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, few = model(x), model(x[:3])
        with packed(model, 16, 100):
            assert all("forward" in vars(layer) for layer in model)
            torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
            assert torch.equal(model(x[:3]), few)
        with pytest.raises(RuntimeError), packed(model, 16, 100):
            model(x[..., :3])
    assert not any("forward" in vars(layer) for layer in model)


def test_weights_that_moved_are_arranged_anew():
    model = tiny_model("llama")
    engine = Engine(model, max_batch=16)
    first = engine.generate(given(16), Sampling(40), seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    second = engine.generate(given(16), Sampling(40), seed=3)
    assert [s.ids for s in first] != [s.ids for s in second]


@pytest.mark.parametrize(("rows", "steps", "limit"), [(8, 100, 1 << 30), (64, 8, 1 << 30), (64, 100, 100)])
def test_where_it_does_not_pay_nothing_is_touched(rows, steps, limit, monkeypatch):
    monkeypatch.setattr(room, "BYTES", limit)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40))
    with packed(model, rows, steps):
        assert "forward" not in vars(model[0])
    double = torch.nn.Sequential(torch.nn.Linear(24, 40)).double()
    with packed(double, 64, 100):
        assert "forward" not in vars(double[0])
