"""How large a model is, from its config alone: no weight is read or made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf

from steersman.model.source import NOTHING, STATE, find, read_config

SIZES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32_000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256},
    "13b": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40, "vocab_size": 32_000},
    "70b": {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128_256},
}  # fmt: skip
"""Llama-style shapes by their usual names."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Parameters in all, of the largest layer, and of the tables of vocabulary x hidden; and what a cache holds."""

    name: str
    parameters: int
    largest_layer: int
    tables: int
    layers: int
    hidden: int
    cached: int
    """Numbers that one token leaves in the cache of one layer: keys and values."""
    inner: int = 0
    """Width between the matrices of a layer's feed-forward part; 0 is not known, then four times `hidden`."""
    query: int = 0
    """Numbers of a token's queries in one layer; 0 is not known, then `hidden`."""
    heads: int = 1
    vocabulary: int = 0

    @property
    def wide(self) -> int:
        return self.inner or 4 * self.hidden

    def activations(self, number: int, scores: int = 0) -> float:
        """Bytes that a token keeps of one layer for the backward pass, numbers having `number` bytes.

            2 (4 + 2 n) h + n (2 q + k) + 4 n i   [+ n heads T where attention keeps its scores]

        Two norms: their input in float32, the normalised and the scaled one; queries, keys, values and what attention
        gives; the feed-forward part's two factors, the activation of one and their product. As transformers' Llama is
        written, counted on its saved tensors (`benchmarks/plan_memory.py`).
        """
        norms = 2 * (4 + 2 * number) * self.hidden
        query = self.query or self.hidden
        attention = number * (4 * query + self.heads * scores if scores else 2 * query + self.cached)
        return norms + attention + 4 * number * self.wide

    def adapters(self, r: int) -> int:
        """Parameters of rank-r adapters on a layer's seven matrices, in all layers: r (in + out) of each."""
        h, q, k, i = self.hidden, self.query or self.hidden, self.cached // 2, self.wide
        return self.layers * r * (2 * (h + q) + 2 * (h + k) + 3 * (h + i))

    def scalar(self) -> Shape:
        """The same trunk under a head of one number: no output layer of words."""
        table = self.vocabulary * self.hidden
        untied = table if self.tables > table else 0
        return replace(self, parameters=self.parameters - untied, tables=table, vocabulary=0)

    def cache(self, length: float, number: int) -> float:
        """Bytes of one sequence's keys and values, with `number` bytes each."""
        return self.layers * self.cached * length * number


def shape_of(path: str) -> Shape:
    """The shape of the model in a folder, or of one of `SIZES` by its name."""
    if path.lower() in SIZES:
        config: Any = hf.LlamaConfig(**SIZES[path.lower()])
    else:
        config = read_config(*find(path), [])
    return shape_from(config, path)


def shape_from(config: Any, name: str) -> Shape:
    """The shape of a model of this config."""
    with torch.device("meta"):
        auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
        model: Any = auto.from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    names = set(model._no_split_modules or ())
    layers = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names]
    tables = {id(e.weight): e.weight.numel() for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    widths, queries = key_widths(text), [heads * size for heads, _, size in _heads(text, text.num_hidden_layers)]
    return Shape(
        name=name, parameters=sum(p.numel() for p in model.parameters()), largest_layer=max(layers, default=0),
        tables=sum(tables.values()), layers=text.num_hidden_layers, hidden=text.hidden_size,
        cached=round(2 * sum(widths) / text.num_hidden_layers), inner=getattr(text, "intermediate_size", None) or 0,
        query=round(sum(queries) / max(len(queries), 1)), heads=getattr(text, "num_attention_heads", 1),
        vocabulary=text.vocab_size,
    )  # fmt: skip


def key_widths(text: Any) -> list[int]:
    """Numbers of a token's keys, and as many of its values, in each layer of a text config that keeps its own: layers
    may differ (Gemma 4), the last ones may read those of layers before (Gemma 3n), and some keep a state (`STATE`) or
    nothing."""
    return [keys * size for _, keys, size in _heads(text, own_layers(text))]


def own_layers(text: Any) -> int:
    """How many layers of a text config keep something of their own; those that read what others keep come last."""
    return text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)


def _heads(text: Any, layers: int) -> list[tuple[int, int, int]]:
    """Heads of queries, heads of keys, and numbers of a head, in each of the first layers that has attention."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    return [
        (
            layer.num_attention_heads,
            getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads,
            getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
        )
        for kind, layer in zip(kinds[:layers], text.per_layer_config, strict=False)
        if kind not in (*STATE, *NOTHING)
    ]
