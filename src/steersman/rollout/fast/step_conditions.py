"""Which models a compiled step does: what it must know of them, said where it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from steersman.model.fast.linear import LINEAR

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding in which a position's angles do not depend on how long the sequences are."""
GATES = {"silu": 0, "gelu_pytorch_tanh": 1}


def why_no_compiled_step(model: Any) -> str | None:
    """What about the model keeps it from compiled steps; None where nothing does."""
    kind = type(model)
    if kind.__name__ not in FAMILIES or not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} is none of {', '.join(FAMILIES)}"
    for reason, holds in CONDITIONS:
        if not holds(model):
            return reason
    return None


def _plain_layers(model: Any) -> bool:
    """Linear layers as torch has them: adapters, quantised layers and subclasses do more."""
    return all(type(linear) in LINEAR for linear in [*_all_linears(model), model.lm_head])


def _in_float32(model: Any) -> bool:
    return all(p.is_cpu and p.dtype == torch.float32 and type(p) is nn.Parameter for p in model.parameters())


def _plain_weights(model: Any) -> bool:
    parts = [model.model.embed_tokens, *_all_linears(model), *_all_norms(model), model.lm_head]
    return all(type(part.weight) is nn.Parameter for part in parts)


def _no_other_bias(model: Any) -> bool:
    feed_forward = [linear for layer in model.model.layers for linear in linears_of(layer)[4:]]
    return all(linear.bias is None for linear in [*feed_forward, model.lm_head])


def _turns_whole_heads(model: Any) -> bool:
    rotary, width = model.model.rotary_emb, model.model.layers[0].self_attn.head_dim
    return getattr(rotary, "rope_type", None) in ROTATIONS and 2 * len(rotary.inv_freq) == width


def _as_deep_as_it_says(model: Any) -> bool:
    return len(model.model.layers) == model.config.num_hidden_layers


def _of_one_shape(model: Any) -> bool:
    """Whether every layer has the shapes that the first one has, and all fit together as the compiled step takes
    them: a pruned model's need not, and a pointer knows no bounds."""
    attention, hidden = model.model.layers[0].self_attn, model.config.hidden_size
    width, embedding, head = attention.head_dim, model.model.embed_tokens.weight, model.lm_head.weight
    heads, kv_heads, inner = (
        len(linear.weight) for linear in (attention.q_proj, attention.k_proj, model.model.layers[0].mlp.gate_proj)
    )
    shapes = [
        (heads, hidden), (kv_heads, hidden), (kv_heads, hidden), (hidden, heads),
        (inner, hidden), (inner, hidden), (hidden, inner),
    ]  # fmt: skip
    if not (width > 0 and heads % width == kv_heads % width == 0 and kv_heads > 0 and heads % kv_heads == 0):
        return False
    own_norms = {tuple(norm is not None for norm in query_key_norms_of(layer)) for layer in model.model.layers}
    return (
        len(own_norms) == 1
        and embedding.shape[1] == head.shape[1] == hidden
        and len(embedding) >= len(head) > 0
        and model.model.norm.weight.shape == (hidden,)
        and all(_layer_fits(layer, shapes, hidden, width) for layer in model.model.layers)
        and len({(layer.self_attn.head_dim, layer.self_attn.scaling) for layer in model.model.layers}) == 1
        and all(p.is_contiguous() for p in model.parameters())
    )


def _layer_fits(layer: Any, shapes: list[tuple[int, int]], hidden: int, width: int) -> bool:
    linears = linears_of(layer)
    return (
        all(tuple(linear.weight.shape) == shape for linear, shape in zip(linears, shapes, strict=True))
        and all(linear.bias is None or linear.bias.shape == linear.weight.shape[:1] for linear in linears)
        and layer.input_layernorm.weight.shape == layer.post_attention_layernorm.weight.shape == (hidden,)
        and all(norm is None or norm.weight.shape == (width,) for norm in query_key_norms_of(layer))
    )


def _all_linears(model: Any) -> list[Any]:
    return [linear for layer in model.model.layers for linear in linears_of(layer)]


def _all_norms(model: Any) -> list[Any]:
    return [model.model.norm, *(norm for layer in model.model.layers for norm in _norms(layer))]


def linears_of(layer: Any) -> list[Any]:
    attention, feed_forward = layer.self_attn, layer.mlp
    return [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj,
    ]  # fmt: skip


def query_key_norms_of(layer: Any) -> tuple[Any, Any]:
    return getattr(layer.self_attn, "q_norm", None), getattr(layer.self_attn, "k_norm", None)


def _norms(layer: Any) -> list[Any]:
    own = [norm for norm in query_key_norms_of(layer) if norm is not None]
    return [layer.input_layernorm, layer.post_attention_layernorm, *own]


CONDITIONS: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("a layer of it is no plain nn.Linear (adapters, quantised weights)", _plain_layers),
    ("its weights are not all float32 on the CPU", _in_float32),
    ("a weight of it is computed from others (a parametrization)", _plain_weights),
    ("its feed-forward or output layers have biases", _no_other_bias),
    ("its norms differ in epsilon", lambda model: len({norm.variance_epsilon for norm in _all_norms(model)}) == 1),
    ("it has not as many layers as its config says", _as_deep_as_it_says),
    ("its angles depend on the length, or turn a part of a head", _turns_whole_heads),
    (f"its gate is none of {', '.join(GATES)}", lambda model: model.config.hidden_act in GATES),
    ("its layers are not all of one shape", _of_one_shape),
)
"""What must hold, and what is said where it does not; each is asked only where those before it hold."""
