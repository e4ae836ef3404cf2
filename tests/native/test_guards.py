"""The guards in front of raw pointers check at least what torch checks, and stand aside where it would broadcast,
convert or refuse."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from torch.nn.utils import parametrize
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from steersman import native
from steersman.model.fast import attention
from steersman.model.fast.fused import quicken
from steersman.model.fast.plain import plain_layers
from steersman.native import sequences
from steersman.native.decode import decode_attention, draws
from steersman.native.layers import gates, norms, rms_norm, rotates
from steersman.rollout import Engine, Sampling
from steersman.rollout.fast import packed
from steersman.rollout.fast.compiled_step import compiled_step_of
from steersman.rollout.sampling import draw
from steersman.types import Prompt, SteersmanError

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fewer_kv_heads(model):
    of = model.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        wide = getattr(of, name)
        setattr(of, name, nn.Linear(wide.in_features, of.head_dim, bias=False))
    of.num_key_value_groups = of.q_proj.out_features // of.head_dim


def larger_head(model):
    model.lm_head = nn.Linear(model.config.hidden_size, len(model.model.embed_tokens.weight) + 32, bias=False)


def expanded_norm(model):
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(torch.ones(1).expand(model.config.hidden_size))


def narrower_feed_forward(model):
    model.model.layers[1].mlp.up_proj = nn.Linear(model.config.hidden_size, 3, bias=False)


def another_scale(model):
    model.model.layers[1].self_attn.scaling *= 2


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def computed_embedding(model):
    """Its weight is a new tensor whenever it is asked for."""
    parametrize.register_parametrization(model.model.embed_tokens, "weight", Twice())


@pytest.mark.parametrize(
    "change",
    [fewer_kv_heads, larger_head, expanded_norm, narrower_feed_forward, another_scale, computed_embedding],
    ids=lambda f: f.__name__,
)
def test_no_compiled_step_for_a_model_whose_layers_do_not_fit_together(change):
    model = tiny_model("llama")
    assert compiled_step_of(model, 2) is not None
    change(model)
    assert compiled_step_of(model, 2) is None


def test_a_head_larger_than_the_embedding_goes_module_by_module():
    """Its ids beyond the embedding can't be fed back; sampling the others gives what the modules give."""
    model = tiny_model("llama")
    larger_head(model)
    model.lm_head.weight.data[-32:] = 0
    samples = Engine(model, eos_token_id=[2]).generate([Prompt([3, 4], "")], Sampling(4, temperature=0.05), seed=1)
    assert len(samples[0].ids) > 0


def test_weights_replaced_during_a_call_are_kept_for_it():
    model = tiny_model("llama")
    whole = compiled_step_of(model, 2)
    held = {p.data_ptr() for p in whole.keep_alive[2]}
    before = model.model.embed_tokens.weight.data_ptr()
    model.model.embed_tokens.weight.data = torch.zeros_like(model.model.embed_tokens.weight)
    assert before in held


def test_one_engine_takes_one_thread_at_a_time():
    engine = Engine(tiny_model("llama"), eos_token_id=[2])
    inside, leave, said = threading.Event(), threading.Event(), []

    def progress(*_):
        inside.set()
        leave.wait(30)

    worker = threading.Thread(
        target=lambda: said.append(engine.generate([Prompt([3, 4], "")], Sampling(4), progress=progress))
    )
    worker.start()
    try:
        assert inside.wait(30)
        with pytest.raises(SteersmanError, match="another thread is sampling"):
            engine.generate([Prompt([3, 4], "")], Sampling(4))
    finally:
        leave.set()
        worker.join()
    assert len(said) == 1
    assert len(engine.generate([Prompt([3, 4], "")], Sampling(4))) == 1


@pytest.mark.parametrize("weight", [torch.ones(1).expand(8), numbers(16)[::2]], ids=["expanded", "strided"])
def test_norm_with_a_weight_that_is_not_in_one_piece(weight):
    model = tiny_model("llama")
    quicken(model)
    norm = model.model.norm
    norm.weight = nn.Parameter(weight, requires_grad=False)
    x = numbers(3, 8)
    with plain_layers():
        expected = norm(x)
    torch.testing.assert_close(norm(x), expected)


def test_what_each_loop_takes():
    x = numbers(2, 3, 5, 8)
    assert norms(x, numbers(8))
    assert not norms(x, numbers(1))
    assert not norms(x, numbers(8).double())
    assert not norms(x[..., :0], numbers(0))
    assert gates(x, x)
    assert not gates(x, x[:1])
    assert not gates(x, x.double())
    assert rotates(x, numbers(2, 5, 8), numbers(2, 5, 8))
    assert rotates(x, numbers(1, 5, 8), numbers(1, 5, 8))
    assert not rotates(x, numbers(1, 1, 8), numbers(1, 1, 8))
    assert not rotates(x, numbers(3, 5, 8), numbers(3, 5, 8))
    assert not rotates(x, numbers(1, 5, 8), numbers(1, 4, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_projections_of_another_dtype_or_shape_go_the_plain_way(dtype):
    """As torch multiplies them: the product of unlike dtypes or shapes is its own affair."""
    model = tiny_model("llama")
    quicken(model)
    layer = model.model.layers[0].mlp
    x = numbers(2, 4, model.config.hidden_size)
    layer.gate_proj.register_forward_hook(lambda *given: given[2].to(dtype))
    layer.down_proj = nn.Identity()
    torch.testing.assert_close(layer(x), layer.act_fn(layer.gate_proj(x)) * layer.up_proj(x))
    layer.up_proj.register_forward_hook(lambda *given: given[2][:1])
    assert layer(x).shape == layer.gate_proj(x).shape


CASES = {
    "keys of one row": lambda q, k, v, m: (q, k[:1], v, m),
    "values of one row": lambda q, k, v, m: (q, k, v[:1], m),
    "values shorter than keys": lambda q, k, v, m: (q, k, v[:, :, :-1], m),
    "mask that is broadcast over keys": lambda q, k, v, m: (q, k, v, m[..., :1].expand(m.shape)),
    "mask of another batch": lambda q, k, v, m: (q, k, v, m[:1].expand(3, -1, -1, -1)),
    "heads that are no multiple": lambda q, k, v, m: (q, torch.cat([k, k[:, :1]], 1), torch.cat([v, v[:, :1]], 1), m),
    "keys narrower than queries": lambda q, k, v, m: (q, k[..., :16], v, m),
    "no keys": lambda q, k, v, m: (q, k[:, :, :0], v[:, :, :0], m[..., :0]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("queries", [1, 4])
def test_attention_of_other_shapes_is_left_to_torch(case, queries):
    q, k, v = numbers(2, 4, queries, 32), numbers(2, 2, 6, 32, seed=1), numbers(2, 2, 6, 32, seed=2)
    mask = torch.ones(2, 1, queries, 6, dtype=torch.bool)
    additive = torch.zeros(2, 1, queries, 6)
    assert sequences.attends(q, k, v, mask)
    assert not sequences.attends(*CASES[case](q, k, v, mask))
    if queries == 1:
        assert attention._one_token(q, k, v, additive)
        assert not attention._one_token(*CASES[case](q, k, v, additive))


def test_a_key_that_is_forbidden_by_minus_infinity_weighs_nothing():
    q, k, v = numbers(1, 1, 1, 16), numbers(1, 1, 3, 16, seed=1), numbers(1, 1, 3, 16, seed=2)
    mask = torch.tensor([0.0, -torch.inf, -1e30]).view(1, 1, 1, 3)
    out = decode_attention(q, k, v, mask, 0.25)
    torch.testing.assert_close(out.flatten(), v[0, 0, 0])


def test_a_row_that_sees_nothing_gets_zeros_as_torch_gives_and_nan_stays():
    q, k, v = numbers(2, 2, 1, 16), numbers(2, 2, 3, 16, seed=1), numbers(2, 2, 3, 16, seed=2)
    mask = torch.zeros(2, 1, 1, 3)
    mask[1] = -torch.inf
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    out, _ = attention.attention(module, q, k, v, mask)
    torch.testing.assert_close(out, sdpa_attention_forward(module, q, k, v, mask)[0], atol=2e-6, rtol=1e-5)
    assert out[1].eq(0).all()
    assert decode_attention(q * torch.nan, k, v, mask, 0.25).isnan().all()


@pytest.mark.parametrize("queries", [1, 7])
def test_heads_that_the_layer_does_not_repeat_are_refused_as_torch_refuses_them(queries):
    given = numbers(2, 4, queries, 16), numbers(2, 2, 7, 16, seed=1), numbers(2, 2, 7, 16, seed=2)
    with pytest.raises(RuntimeError, match="must match the size"):
        attention.attention(SimpleNamespace(is_causal=True, num_key_value_groups=1), *given, None)


@pytest.mark.parametrize("scale", [-40.0, 0.0])
def test_a_scale_that_is_not_positive(scale):
    q, k, v = (numbers(1, 2, 7, 16, seed=i) for i in range(3))
    scores = (scale * q @ k.mT).masked_fill(~torch.ones(7, 7).bool().tril(), -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(sequences.attend(q, k, v, None, scale), expected, atol=1e-5, rtol=1e-5)


def test_one_uniform_number_for_many_rows_is_broadcast():
    x, uniform = numbers(64, 40), torch.tensor([0.5])
    assert not draws(x, uniform)
    assert torch.equal(draw(x, uniform)[0], draw(x, uniform.expand(64))[0])


def test_a_weight_replaced_before_the_backward_pass_was_kept():
    x, weight = numbers(3, 512), nn.Parameter(numbers(512, seed=1))
    scaled = x.requires_grad_()
    out = rms_norm(scaled, weight, 1e-6)
    (expected,) = torch.autograd.grad(out.sum(), scaled, retain_graph=True)
    weight.data = torch.ones(1)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x[..., :1]], ids=["dtype", "shape"])
def test_what_hooks_change_between_the_passes_is_refused(change):
    x, weight = numbers(3, 512).requires_grad_(), numbers(512, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, change):
        out = rms_norm(x, weight, 1e-6)
        with pytest.raises(RuntimeError, match="given back by a hook"):
            out.sum().backward()


def test_a_bias_replaced_during_a_call_is_read_as_it_is():
    layer, x = nn.Linear(8, 64), numbers(2, 8)
    with torch.inference_mode(), packed.packed(layer):
        assert "forward" in vars(layer)
        layer.bias.data = torch.ones(1)
        torch.testing.assert_close(layer(x), x @ layer.weight.T + 1)


def test_layers_of_one_class_with_other_activations_keep_theirs():
    model, ids = tiny_model("llama"), torch.arange(6)[None]
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    expected = model(ids).logits
    quicken(model)
    torch.testing.assert_close(model(ids).logits, expected, atol=2e-6, rtol=1e-4)


def test_a_cache_of_another_shape_than_the_weights_say_is_left_to_the_modules(monkeypatch):
    """Hooks on the projections keep one head of keys: the buffers that the prefill made are smaller."""
    model = tiny_model("llama")
    of = model.model.layers[1].self_attn
    for projection in (of.k_proj, of.v_proj):
        projection.register_forward_hook(lambda _module, _given, out: out[..., : of.head_dim])
    of.num_key_value_groups = of.q_proj.out_features // of.head_dim
    assert compiled_step_of(model, 2) is not None
    expected = Engine(model, eos_token_id=[2]).generate([Prompt([3, 4], "")], Sampling(20))
    monkeypatch.setattr(packed, "STEPS", 1)
    found = Engine(model, eos_token_id=[2]).generate([Prompt([3, 4], "")], Sampling(20))
    assert found[0].ids == expected[0].ids


def test_a_call_within_a_call_is_refused():
    engine, prompt = Engine(tiny_model("llama"), eos_token_id=[2]), Prompt([3, 4], "")
    with pytest.raises(SteersmanError, match="its own `progress` calls it"):
        engine.generate([prompt], Sampling(4), progress=lambda *_: engine.generate([prompt], Sampling(4)))
    assert len(engine.generate([prompt], Sampling(4))) == 1
