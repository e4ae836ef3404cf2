"""A step of decoding in one compiled call, for models of the Llama kind in float32 on a CPU.

Module by module, a step of a small model is mostly Python and the starting of small operations, and one of a larger
model waits for its weights again and again; in one call neither is so. Whose step it is: `step_conditions`.
Whether it does what a model does is asked at the first step of every call of the engine, which is done both ways:
hooks and whatever else sits in a model's modules are noticed there, and the modules go on alone.
"""

from __future__ import annotations

import ctypes
import operator
from typing import Any

import torch
from torch import Tensor

from steersman.native import step
from steersman.native.products import rearrange
from steersman.rollout.cache import LiveCache
from steersman.rollout.fast.step_conditions import GATES, linears_of, query_key_norms_of, why_no_compiled_step

CLOSE = 1e-3
"""How far logits may be apart, as a share of the largest: more than rounding gives, less than another model would."""


class CompiledStep:
    """One model's weights laid out for compiled steps; they are read when it is made, and stand for one call."""

    def __init__(self, model: Any, rows: int) -> None:
        self.rotary = model.model.rotary_emb
        layers, config = model.model.layers, model.config
        attention, feed_forward = layers[0].self_attn, layers[0].mlp
        matrices = [linear.weight for layer in layers for linear in linears_of(layer)]
        # what the pointers below point to: the numbers themselves, whatever becomes of the parameters meanwhile
        self.keep_alive: list[Any] = [model, rearrange([*matrices, model.lm_head.weight]), _storages(model)]
        panels = iter(self.keep_alive[1])
        self.layers = (step.Layer * len(layers))()
        for to, layer in zip(self.layers, layers, strict=True):
            of = layer.self_attn
            for name in ("query", "key", "value", "out", "gate", "up", "down"):
                setattr(to, name, _at(next(panels).data))
            to.query_bias, to.key_bias, to.value_bias = (_at(p.bias) for p in (of.q_proj, of.k_proj, of.v_proj))
            to.out_bias = _at(of.o_proj.bias)
            to.query_norm, to.key_norm = (_at(getattr(n, "weight", None)) for n in query_key_norms_of(layer))
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
        self.verified = False

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
        now = step.StepArguments(
            ids=_at(ids), positions=_at(positions), order=order, start=start, leader=leader, until=until,
            logits=_at(logits), rows=len(ids), column=live.live_layers[0].column,
            **{name: _at(x) for name, x in self.scratch.items()},
        )  # fmt: skip
        step.decode_step(self.model, now)
        return logits

    def agrees(self, logits: Tensor, expected: Tensor) -> bool:
        """Whether a step gave what the model's modules gave; from then on it is taken at its word."""
        self.verified = bool((logits - expected).abs().max() <= CLOSE * expected.abs().max())
        return self.verified

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
    return CompiledStep(model, rows) if why_no_compiled_step(model) is None else None


def _storages(model: Any) -> list[Tensor]:
    return [p.data for p in model.parameters()]


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
