"""Adapters added in place give what peft gives, in values, gradients and second derivatives, in fewer tensors."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import peft
import pytest
import torch
from fast_paths import small
from model_inputs import word_tokenizer
from tiny_models import tiny_model

from steersman import native
from steersman.data import Encoded, collate
from steersman.model import Policy, load_policy
from steersman.model.in_place import add_in_place
from steersman.model.lora import LoraConfig, add_lora
from steersman.ops import products
from steersman.plan.made import NewStorageBytes

IDS = torch.arange(3, 23).view(2, 10)


def pair(family: str = "llama", dtype: torch.dtype = torch.float64, **given: Any) -> tuple[Any, Any]:
    """A model with adapters that were trained a little, as peft has it and as we have it."""
    model = tiny_model(family, 96).to(dtype)
    add_lora(model, LoraConfig(r=3, **given))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1)
    theirs = copy.deepcopy(model)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            vars(module).pop("forward", None)
    return model, theirs


def gradients(model: Any) -> list[torch.Tensor]:
    loss = model(input_ids=IDS).logits.pow(2).mean()
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("given", [{}, {"rslora": True}, {"dora": True}, {"targets": ["q_proj", "down_proj"]}])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_values_and_gradients_are_those_of_peft(family, given):
    if family == "gpt2" and "targets" in given:
        given = {"targets": ["c_attn"]}
    ours, theirs = pair(family, torch.float64, **given)
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_second_derivatives_too():
    found = []
    for model in pair():
        model.set_attn_implementation("eager")
        weight = next(p for n, p in model.named_parameters() if "lora_A" in n)
        loss = model(input_ids=IDS).logits.pow(2).mean()
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), weight)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_adapters_off_and_merged_are_pefts():
    ours, _ = pair(dtype=torch.float32)
    layer = ours.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 4, layer.in_features)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
    layer.enable_adapters(True)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_float32_adapters_of_a_half_precision_base_compute_as_it_does_and_learn_in_float32():
    """They share their input with it: a float32 copy of it, as peft makes, would be kept for each layer."""
    exact, _ = pair()
    ours, theirs = pair(dtype=torch.float32)
    made = []
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                module.base_layer.to(torch.bfloat16)
    x, layers = torch.randn(2, 40, 32), [m.model.layers[1].mlp.gate_proj for m in (ours, theirs)]
    assert layers[0].lora_A["default"].weight.dtype == torch.float32
    outs = []
    for layer in layers:
        kept: dict[int, int] = {}

        def pack(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outs.append(layer(x.bfloat16()))
        made.append(sum(kept.values()))
        outs[-1].float().pow(2).mean().backward()
    assert outs[0].dtype == torch.bfloat16
    assert made[0] <= 0.6 * made[1]
    right = exact.model.layers[1].mlp.gate_proj
    torch.testing.assert_close(outs[0].double(), right(x.double()), rtol=0.02, atol=0.02)
    right(x.double()).pow(2).mean().backward()
    for part in ("lora_A", "lora_B"):
        own, expected = (getattr(layer, part)["default"].weight.grad for layer in (layers[0], right))
        assert own.dtype == torch.float32
        assert (own.double() - expected).norm() < 0.02 * expected.norm()


def test_no_tensor_of_the_layers_width_is_thrown_away():
    ours, theirs = (Policy(model, None) for model in pair(dtype=torch.float32))
    tokens = collate([Encoded([5] * 20, [6] * 20, [True] * 20)])
    made = []
    for policy in (ours, theirs):
        with torch.profiler.profile(profile_memory=True) as seen:
            policy.hidden(tokens)
        made.append(sum(max(e.self_cpu_memory_usage, 0) for e in (seen.events() or []) if e.name != "[memory]"))
    assert made[0] < 0.7 * made[1]


@pytest.mark.parametrize("rows", [(7,), (2, 500)])
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_models_as_runs_load_them_in_4_bits_or_not(kind, rows, tmp_path):
    """With layers made fast, values and gradients to rounding, in fewer tensors of the layer's width."""
    if kind != "none":
        pytest.importorskip("bitsandbytes")
    tiny_model("llama").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu", quantise=kind, lora=LoraConfig(r=3))
    layer = policy.model.model.layers[0].mlp.gate_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(*rows, layer.in_features, requires_grad=True)
    inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    found, made = [], []
    for forward in (layer.forward, partial(type(layer).forward, layer)):
        with NewStorageBytes() as seen:
            out = forward(x)
        made.append(seen.total)
        found.append([out, *torch.autograd.grad(out.pow(2).sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    width = found[0][0].nbytes
    assert made[0] <= made[1] - 2 * width


def test_a_copy_of_a_model_computes_with_its_own_weights():
    ours, _ = pair()
    other = copy.deepcopy(ours)
    before = ours(input_ids=IDS).logits
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "lora_B" in name:
                p.zero_()
    assert torch.equal(ours(input_ids=IDS).logits, before)
    assert not torch.allclose(other(input_ids=IDS).logits, before)


def test_without_adapters_nothing_happens():
    model = tiny_model("llama", 96)
    add_in_place(model)
    assert all("forward" not in vars(m) for m in model.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")
def test_adapters_do_not_keep_what_a_norm_or_a_gate_gave(monkeypatch):
    """They have it computed again, as whole layers do: `ops.recompute`."""
    monkeypatch.setattr(products, "MIN_RECOMPUTED", 1)
    model = small("llama")
    add_lora(model, LoraConfig(r=3))
    policy = Policy(model, None)
    sequence = collate([Encoded([5] * 16, [6] * 16, [True] * 16)])

    def kept() -> int:
        seen: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (seen.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}), x)[1], lambda x: x
        ):
            states = policy.reader.hidden(sequence)
        assert states.requires_grad
        return sum(seen.values())

    fewer = kept()
    monkeypatch.setattr(products, "maker", lambda _: None)
    # the first layer's first norm reads what learns nothing; the last feed-forward layer sees the 16 responses alone
    norms, gates = (32 + 32) * model.config.hidden_size, (32 + 16) * model.config.intermediate_size
    assert kept() - fewer == 4 * (norms + gates)
