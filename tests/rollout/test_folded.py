"""Adapters added in while a model generates: the same samples, the compiled step, and nothing changed after it."""

from __future__ import annotations

import pytest
import torch
from rollout_oracle import ENDS, ragged
from test_engine_logp import assert_recorded
from tiny_models import tiny_model
from transformers import MixtralConfig, MixtralForCausalLM

from steersman import native
from steersman.model import LoraConfig
from steersman.model.fast.folded import folded, folded_bytes
from steersman.model.lora import add_lora
from steersman.rollout import Engine, Sampling
from steersman.rollout.fast import compiled_step, packed


def with_adapters(model, targets: str | list[str] = "all-linear"):
    """Adapters whose second matrix is not zero, as after some updates."""
    adapters = add_lora(model, LoraConfig(r=3, alpha=6, targets=targets))
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_B" in name or "lora_embedding_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(i))
    return adapters


def weights(model) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def lora_layers(model) -> list:
    return [m for m in model.modules() if type(m).__module__ == "peft.tuners.lora.layer"]


def test_samples_and_log_probabilities_are_those_of_the_adapters(live_model, monkeypatch):
    with_adapters(live_model)
    before, layers, sampling = weights(live_model), lora_layers(live_model), Sampling(12, temperature=1.2)
    found = Engine(live_model, max_batch=6, eos_token_id=ENDS).generate(ragged(), sampling, n=2, seed=3)
    assert_recorded(live_model, found, sampling)
    assert lora_layers(live_model) == layers
    assert all(torch.equal(x, before[name]) for name, x in live_model.state_dict().items())
    monkeypatch.setattr(packed, "STEPS", 1 << 30)
    beside = Engine(live_model, max_batch=6, eos_token_id=ENDS).generate(ragged(), sampling, n=2, seed=3)
    assert [s.ids for s in found] == [s.ids for s in beside]


@pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")
def test_the_compiled_step_of_the_whole_model_is_used(monkeypatch):
    trusted, inner = [], compiled_step.CompiledStep.__call__
    monkeypatch.setattr(
        compiled_step.CompiledStep, "__call__", lambda self, *a: trusted.append(self.verified) or inner(self, *a)
    )
    model = tiny_model("llama")
    with_adapters(model)
    Engine(model, eos_token_id=ENDS).generate(ragged(), Sampling(24), seed=1)
    assert sum(trusted) > 20


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_nothing_of_the_adapters_is_changed(family):
    model = tiny_model(family)
    with_adapters(model)
    before, layers = weights(model), lora_layers(model)
    size = sum(x.get_base_layer().weight.numel() * 4 for x in layers)
    assert layers
    assert folded_bytes(model) == size
    with folded(model):
        assert not lora_layers(model)
    assert lora_layers(model) == layers
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(layer.merged for layer in layers)


def test_an_error_puts_them_back():
    model = tiny_model("llama")
    with_adapters(model)
    layers = lora_layers(model)
    with pytest.raises(IndexError), folded(model):
        model(torch.tensor([[1 << 20]]))
    assert lora_layers(model) == layers


def test_adapters_on_the_embedding_are_added_there_and_not_to_the_output_that_shares_its_weight():
    model = tiny_model("gpt2")
    with_adapters(model, ["wte", "c_attn"])
    ids = torch.tensor([[3, 9, 4]])
    with torch.no_grad():
        expected = model(ids).logits
        with folded(model):
            assert not lora_layers(model)
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_adapters_that_are_off_stay_off():
    model = tiny_model("llama")
    adapters, ids = with_adapters(model), torch.tensor([[3, 9, 4]])
    with torch.no_grad(), adapters.disable_adapter():
        expected = model(ids).logits
        with folded(model):
            assert torch.equal(model(ids).logits, expected)


def test_what_has_no_exact_sum_stays_as_it_is():
    model = tiny_model("llama").bfloat16()
    with_adapters(model)
    with folded(model):
        assert lora_layers(model)
    assert folded_bytes(model) == 0


def test_a_short_call_is_not_worth_it(monkeypatch):
    monkeypatch.setattr(packed, "STEPS", 32)
    model, opened = tiny_model("llama"), []
    with_adapters(model)
    monkeypatch.setattr(packed, "folded", lambda m: opened.append(m) or folded(m))
    engine = Engine(model, eos_token_id=ENDS)
    engine.generate(ragged(3), Sampling(31), seed=1)
    assert not opened
    engine.generate(ragged(3), Sampling(32), seed=1)
    assert opened == [model]


def test_experts_with_adapters_are_plain_ones_meanwhile():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=97, num_local_experts=4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    adapters = with_adapters(model, ["q_proj", "gate_up_proj", "down_proj"])
    ids, before, layers = torch.tensor([[5, 6, 7, 8]]), weights(model), lora_layers(model)
    assert len(layers) == 6
    kinds = ("q_proj", "gate_up_proj", "down_proj")
    plain = [
        x for name, x in model.named_parameters() if name.removesuffix(".weight").endswith(("base_layer", *kinds))
    ]
    assert folded_bytes(model) == sum(x.nbytes for x in plain)
    with torch.no_grad():
        expected = model(ids).logits
        with folded(model):
            assert not lora_layers(model)
            torch.testing.assert_close(model(ids).logits, expected)
        with adapters.disable_adapter(), folded(model):
            assert (model(ids).logits - expected).abs().max() > 1e-3
    assert lora_layers(model) == layers
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
