"""Steps by a whole model in one compiled call: what its modules give, for every known family, or else the modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rollout_oracle import ENDS, ragged
from test_engine_logp import assert_recorded, window_model
from tiny_models import tiny_model

from steersman import native
from steersman.rollout import Engine, Sampling
from steersman.rollout import decoder as decoder_room
from steersman.rollout.decoder import Decoder
from steersman.rollout.fast import compiled_step as room

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")

KNOWN = ["llama", "qwen2", "qwen3", "mistral windows", "qwen2 windows"]


def model_of(name: str):
    family, *windows = name.split()
    return window_model(family) if windows else tiny_model(family)


@pytest.fixture
def steps(monkeypatch):
    """Counts compiled steps, and those whose logits were used."""
    seen = SimpleNamespace(made=0, trusted=0)
    inner = room.CompiledStep.__call__

    def call(self, *args):
        seen.made += 1
        seen.trusted += self.verified
        return inner(self, *args)

    monkeypatch.setattr(room.CompiledStep, "__call__", call)
    return seen


def by_modules(monkeypatch, model, *args, **settings):
    with monkeypatch.context() as patch:
        patch.setattr(decoder_room, "compiled_step_of", lambda *_: None)
        return Engine(model, max_batch=6, eos_token_id=ENDS).generate(*args, **settings)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("n", [1, 3])
def test_samples_are_those_of_the_modules(name, n, steps, monkeypatch):
    model, sampling = model_of(name), Sampling(24, temperature=1.2)
    found = Engine(model, max_batch=6, eos_token_id=ENDS).generate(ragged(), sampling, n=n, seed=3)
    assert steps.trusted == steps.made - 1 > 20
    expected = by_modules(monkeypatch, model, ragged(), sampling, n=n, seed=3)
    assert steps.trusted == steps.made - 1
    assert [s.ids for s in found] == [s.ids for s in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.logp == pytest.approx(b.logp, abs=2e-5)
    assert_recorded(model, found, sampling)


def laid(model, prompts, rows):
    """A decoder whose live cache holds these rows of a prefill, and the ids and positions of their first step."""
    decoder = Decoder(model)
    cache, _ = decoder.prefill(prompts)
    decoder.live.clear(len(prompts[0]))
    decoder.live.reserve(len(rows), 64, cache)
    decoder.live.admit(cache, torch.tensor(rows), len(prompts[0]))
    ids = torch.arange(3, 3 + len(rows))[:, None]
    return decoder, ids, torch.full((len(rows), 1), len(prompts[0]))


@torch.inference_mode()
def test_rows_of_one_prompt_read_one_copy_of_it():
    model = tiny_model("llama")
    prompts = [list(range(5, 25)), list(range(30, 50))]
    results = []
    for poisoned in ((), (2, 4)):
        decoder, ids, positions = laid(model, prompts, [0, 1, 0, 1, 1])
        assert decoder.live.reading().tolist() == [[0, 2, 1, 3, 4], [0] * 5, [0, 1, 0, 1, 1], [20] * 5]
        for row in poisoned:  # the last four columns do not fill a tile and are read from each row's own copy
            for layer in decoder.live.live_layers:
                layer.keys[row, :, :16] = layer.values[row, :, :16] = torch.nan
        decoder.live.step(20)
        results.append(room.CompiledStep(model, 5)(ids, positions, decoder.live))
    assert torch.equal(*results)
    rows = [[*prompts[p], int(i)] for p, i in zip([0, 1, 0, 1, 1], ids, strict=True)]
    expected = model(torch.tensor(rows)).logits[:, -1]
    torch.testing.assert_close(results[0], expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_rows_that_move_or_lose_their_leader_are_read_rightly():
    decoder, _, _ = laid(tiny_model("llama"), [list(range(5, 25)), list(range(30, 50))], [0, 0, 1, 0, 1])
    decoder.live.keep(4, [(0, 4)])  # the first row leaves, the last takes its place
    assert decoder.live.reading().tolist() == [[0, 2, 1, 3], [0] * 4, [0, 1, 0, 1], [20] * 4]


@pytest.mark.parametrize("change", ["hook", "parameter of another kind", "bias", "unknown gate"])
def test_a_model_that_does_something_else_is_left_to_its_modules(change, steps, monkeypatch):
    model = tiny_model("llama")
    if change == "hook":  # seen at the first step only
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 1.1)
    elif change == "parameter of another kind":
        model.model.layers[0].mlp.up_proj = torch.nn.utils.parametrizations.weight_norm(
            model.model.layers[0].mlp.up_proj
        )
    elif change == "bias":
        model.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(32))
    else:
        model.config.hidden_act = "relu"
    found = Engine(model, max_batch=6, eos_token_id=ENDS).generate(ragged(), Sampling(16), seed=3)
    assert steps.trusted == 0
    assert steps.made == (change == "hook")
    expected = by_modules(monkeypatch, model, ragged(), Sampling(16), seed=3)
    assert [s.ids for s in found] == [s.ids for s in expected]
    assert_recorded(model, found, Sampling(16))


def test_weights_are_read_anew_by_every_call(steps):
    model = tiny_model("llama")
    engine = Engine(model, max_batch=16)
    first = engine.generate(ragged(), Sampling(20), seed=3)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(-2.0)
    second = engine.generate(ragged(), Sampling(20), seed=3)
    assert steps.trusted == steps.made - 2
    assert [s.ids for s in first] != [s.ids for s in second]
    assert_recorded(model, second, Sampling(20))
    assert engine.decoder.compiled is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_the_modules(dtype, steps):
    Engine(tiny_model("llama").to(dtype), max_batch=6).generate(ragged(), Sampling(12), seed=3)
    assert steps.made == 0
