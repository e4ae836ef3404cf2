"""A model with compiled norms, gates and rotations is the same model: states, gradients, copies."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from tiny_models import tiny_model

from steersman import native
from steersman.model.fast.fused import quick, quicken
from steersman.model.fast.own_forward import ROTATION, own_forward
from steersman.model.fast.plain import plain_layers
from steersman.model.fast.rotation import Rotation

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")


def replaced(model) -> list[str]:
    return [type(module).__name__ for module in model.modules() if "forward" in vars(module)]


def run(model):
    """Logits and gradients of a batch."""
    model.zero_grad()
    ids = torch.arange(24).view(2, 12) % model.config.get_text_config().vocab_size
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_states_and_gradients_are_those_of_the_librarys_layers(family):
    model = tiny_model(family)
    for parameter in model.parameters():  # fresh norms multiply by one, which hides mistakes
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    quicken(model)
    with plain_layers():
        logits, grads = run(model)
    found, found_grads = run(model)
    assert not torch.equal(found, logits), "the compiled loops did not run"
    torch.testing.assert_close(found, logits, atol=2e-5, rtol=2e-5)
    assert found_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, atol=2e-5 * float(grad.abs().max()) + 1e-9, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "kinds", "rotates"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}, True),
        ("gemma3", {"Gemma3RMSNorm", "Gemma3MLP", "Gemma3Attention"}, True),
        ("gpt2", {"GPT2Attention"}, False),
    ],
)
def test_what_is_replaced(family, kinds, rotates):
    model = tiny_model(family)
    assert {type(module).__name__ for module in quicken(model)} == kinds
    assert set(replaced(model)) == kinds
    attention = next(module for module in model.modules() if "Attention" in type(module).__name__)
    own = own_forward(type(attention))
    assert isinstance(inspect.unwrap(own).__globals__.get(ROTATION), Rotation) == rotates
    assert quicken(model) == []
    assert set(replaced(model)) == kinds


def test_a_module_with_a_forward_of_its_own_keeps_it():
    """As accelerate's hooks give it one."""
    model = tiny_model("llama")
    mine = model.model.norm.forward = lambda x: x
    quicken(model)
    assert model.model.norm.forward is mine
    with quick(model):
        assert model.model.norm.forward is mine


def test_a_quickened_model_goes_with_its_last_name_and_a_copy_has_forwards_of_its_own():
    """Without Python's collector, which nothing on an accelerator calls for."""
    gc.collect()
    gc.disable()
    try:
        model = tiny_model("llama")
        quicken(model)
        ids = torch.tensor([[1, 2, 3]])
        wanted = model(ids).logits.detach()
        copied, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        weights = [weakref.ref(p) for p in model.parameters()]
        del model
        assert not any(weight() is not None for weight in weights)
        for other in (copied, read):
            assert set(replaced(other)) == {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}
            assert torch.equal(other(ids).logits, wanted)
            other.model.norm.weight.data.zero_()
            assert not other(ids).logits.any()
    finally:
        gc.enable()


def test_quick_for_a_while_leaves_nothing_even_after_an_error():
    model = tiny_model("llama")
    with quick(model):
        assert replaced(model)
    assert not replaced(model)
    with pytest.raises(KeyError), quick(model):
        raise KeyError
    assert not replaced(model)


def test_a_quick_model_can_be_pickled():
    model = tiny_model("llama")
    quicken(model)
    other = pickle.loads(pickle.dumps(model))
    assert replaced(other) == replaced(model)
    other.model.norm.weight.data.zero_()
    assert float(run(other)[0].abs().max()) == 0.0 < float(run(model)[0].abs().max())


def test_a_copy_uses_its_own_weights():
    model = tiny_model("llama")
    quicken(model)
    other = copy.deepcopy(model)
    before = run(model)[0]
    for module in other.modules():
        if "Norm" in type(module).__name__:
            module.weight.data.zero_()
    assert torch.equal(run(model)[0], before)
    assert float(run(other)[0].abs().max()) < float(before.abs().max()) * 1e-3


def test_a_layer_that_looks_like_one_and_is_not_stays_as_it_is():
    model = tiny_model("llama")

    class MeanNorm(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states):
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    class Doubled(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.norm.__class__ = MeanNorm
    model.model.layers[0].mlp.__class__ = Doubled
    expected = run(model)[0]
    quicken(model)
    assert "forward" not in vars(model.model.norm)
    assert "forward" not in vars(model.model.layers[0].mlp)
    torch.testing.assert_close(run(model)[0], expected, atol=2e-6, rtol=1e-4)


def test_doubles_and_second_derivatives_take_the_librarys_way():
    model = tiny_model("llama").double()
    quicken(model)
    whole = run(model)[0]
    with plain_layers():
        assert torch.equal(run(model)[0], whole)
    single = tiny_model("llama")
    quicken(single)
    ids = torch.arange(6)[None]
    weight = single.model.norm.weight
    with plain_layers(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (first,) = torch.autograd.grad(single(input_ids=ids).logits.square().sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), weight)
    assert bool(second.isfinite().all())
    assert float(second.abs().max()) > 0
