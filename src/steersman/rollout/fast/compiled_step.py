"""A step of decoding in one compiled call, for models of the Llama kind in float32 on a CPU.

Module by module, a step of a small model is mostly Python and the starting of small operations, and one of a larger
model waits for its weights again and again; in one call neither is so. Which families it knows is listed here.
Whether it does what a model does is asked at the first step of every call of the engine, which is done both ways:
hooks and whatever else sits in a model's modules are noticed there, and the modules go on alone.
"""

from __future__ import annotations

import ctypes
import operator
from typing import Any

import torch
from torch import Tensor, nn

from steersman.model.fast.linear import LINEAR
from steersman.native import step
from steersman.native.products import rearrange
from steersman.rollout.cache import LiveCache

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding in which a position's angles do not depend on how long the sequences are."""
GATES = {"silu": 0, "gelu_pytorch_tanh": 1}
CLOSE = 1e-3
"""How far logits may be apart, as a share of the largest: more than rounding gives, less than another model would."""


class CompiledStep:
    """One model's weights laid out for compiled steps; they are read when it is made, and stand for one call."""

    def __init__(self, model: Any, rows: int) -> None:
        self.rotary = model.model.rotary_emb
        layers, config = model.model.layers, model.config
        attention, feed_forward = layers[0].self_attn, layers[0].mlp
        matrices = [linear.weight for layer in layers for linear in _linears(layer)]
        # what the pointers below point to: the numbers themselves, whatever becomes of the parameters meanwhile
        self.kept: list[Any] = [model, rearrange([*matrices, model.lm_head.weight]), _storages(model)]
        panels = iter(self.kept[1])
        self.layers = (step.Layer * len(layers))()
        for to, layer in zip(self.layers, layers, strict=True):
            of = layer.self_attn
            for name in ("query", "key", "value", "out", "gate", "up", "down"):
                setattr(to, name, _at(next(panels).data))
            to.query_bias, to.key_bias, to.value_bias = (_at(p.bias) for p in (of.q_proj, of.k_proj, of.v_proj))
            to.out_bias = _at(of.o_proj.bias)
            to.query_norm, to.key_norm = (_at(getattr(n, "weight", None)) for n in _query_key_norms(layer))
            to.norm, to.inner_norm = _at(layer.input_layernorm.weight), _at(layer.post_attention_layernorm.weight)
        width, inner, hidden = attention.head_dim, len(feed_forward.gate_proj.weight), config.hidden_size
        heads, kv_heads = (len(p.weight) // width for p in (attention.q_proj, attention.k_proj))
        self.model = step.Model(
            parts=ctypes.addressof(self.layers), embedding=_at(model.model.embed_tokens.weight),
            norm=_at(model.model.norm.weight), head=_at(next(panels).data), layers=len(layers), hidden=hidden,
            heads=heads, kv_heads=kv_heads, width=width, inner=inner, vocabulary=len(model.lm_head.weight),
            eps=model.model.norm.variance_epsilon, scale=attention.scaling, gelu=GATES[config.hidden_act],
        )  # fmt: skip
        sizes = {
            "x": hidden, "h": hidden, "projected": (heads + 2 * kv_heads) * width, "mixed": heads * width,
            "opened": inner,
        }  # fmt: skip
        self.scratch = {name: torch.empty(rows, size) for name, size in sizes.items()}
        self.tables: tuple[Tensor, Tensor] | None = None
        self.buffers: list[Tensor | None] = []
        self.proven = False

    def _reads(self, live: LiveCache) -> bool:
        """Whether the live cache's buffers are as the weights say: the modules may have written another shape."""
        buffers = [x for part in live.live_layers for x in (part.keys, part.values)]
        if len(buffers) == len(self.buffers) and all(map(operator.is_, buffers, self.buffers)):
            return True
        if live.mask is None or len(live.live_layers) != len(self.layers):
            return False
        slots, columns = live.mask.shape
        shape = (slots, self.model.kv_heads, columns, self.model.width)
        for x in buffers:
            if x is None or x.shape != shape or x.dtype != torch.float32 or not (x.is_cpu and x.is_contiguous()):
                return False
        self._see(columns)
        self.buffers = buffers
        for layer, keys, values in zip(self.layers, buffers[::2], buffers[1::2], strict=True):
            layer.keys, layer.values = _at(keys), _at(values)
        return True

    def __call__(self, ids: Tensor, positions: Tensor, live: LiveCache) -> Tensor | None:
        """Logits [B, V] after feeding each row one token, as `Decoder.step`; the live cache has prepared the column.

        None, and nothing done, where the cache is not of the shape that the weights say.
        """
        if not self._reads(live):
            return None
        for layer, part in zip(self.layers, live.live_layers, strict=True):
            layer.first = part.first
        ids, positions = ids.contiguous(), positions.contiguous()
        logits = torch.empty(len(ids), self.model.vocabulary)
        order, start, leader, until = (row.ctypes.data for row in live.reading())
        now = step.Now(
            ids=_at(ids), positions=_at(positions), order=order, start=start, leader=leader, until=until,
            logits=_at(logits), rows=len(ids), column=live.live_layers[0].column,
            **{name: _at(x) for name, x in self.scratch.items()},
        )  # fmt: skip
        step.decode_step(self.model, now)
        return logits

    def agrees(self, logits: Tensor, expected: Tensor) -> bool:
        """Whether a step gave what the model's modules gave; from then on it is taken at its word."""
        self.proven = bool((logits - expected).abs().max() <= CLOSE * expected.abs().max())
        return self.proven

    def _see(self, columns: int) -> None:
        """The angles of every position the live cache has room for."""
        if self.model.columns == columns:
            return
        cosine, sine = self.rotary(self.scratch["x"], torch.arange(columns)[None])
        # torch refuses here what does not reach every position
        shape = (1, columns, self.model.width)
        self.tables = cosine.float().expand(shape).contiguous(), sine.float().expand(shape).contiguous()
        self.model.cosine, self.model.sine, self.model.columns = *map(_at, self.tables), columns


def compiled_step_of(model: Any, rows: int) -> CompiledStep | None:
    """The model laid out for compiled steps of up to `rows` rows; None where that is not known to be the same."""
    return CompiledStep(model, rows) if _known(model) else None


def _known(model: Any) -> bool:
    if type(model).__name__ not in FAMILIES or not type(model).__module__.startswith("transformers."):
        return False
    layers, attention = model.model.layers, model.model.layers[0].self_attn
    linears = [linear for layer in layers for linear in _linears(layer)]
    norms = [model.model.norm, *(n for layer in layers for n in _norms(layer))]
    return (
        all(type(linear) in LINEAR for linear in [*linears, model.lm_head])
        and all(linear.bias is None for layer in layers for linear in _linears(layer)[4:])
        and model.lm_head.bias is None
        and all(p.is_cpu and p.dtype == torch.float32 and type(p) is nn.Parameter for p in model.parameters())
        and all(type(of.weight) is nn.Parameter for of in [model.model.embed_tokens, *linears, *norms, model.lm_head])
        and len({norm.variance_epsilon for norm in norms}) == 1
        and len(layers) == model.config.num_hidden_layers
        and getattr(model.model.rotary_emb, "rope_type", None) in ROTATIONS
        and 2 * len(model.model.rotary_emb.inv_freq) == attention.head_dim
        and model.config.hidden_act in GATES
        and _of_one_shape(model)
    )


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
    own_norms = {tuple(norm is not None for norm in _query_key_norms(layer)) for layer in model.model.layers}
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
    linears = _linears(layer)
    return (
        all(tuple(linear.weight.shape) == shape for linear, shape in zip(linears, shapes, strict=True))
        and all(linear.bias is None or linear.bias.shape == linear.weight.shape[:1] for linear in linears)
        and layer.input_layernorm.weight.shape == layer.post_attention_layernorm.weight.shape == (hidden,)
        and all(norm is None or norm.weight.shape == (width,) for norm in _query_key_norms(layer))
    )


def _storages(model: Any) -> list[Tensor]:
    return [p.data for p in model.parameters()]


def _linears(layer: Any) -> list[Any]:
    attention, feed_forward = layer.self_attn, layer.mlp
    return [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj,
    ]  # fmt: skip


def _query_key_norms(layer: Any) -> tuple[Any, Any]:
    return getattr(layer.self_attn, "q_norm", None), getattr(layer.self_attn, "k_norm", None)


def _norms(layer: Any) -> list[Any]:
    own = [norm for norm in _query_key_norms(layer) if norm is not None]
    return [layer.input_layernorm, layer.post_attention_layernorm, *own]


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
