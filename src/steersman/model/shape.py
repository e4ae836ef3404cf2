"""How large a model is, and how much of it adapters train, from its config alone: no weight is read or made."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf

from steersman.model.adapter_files import adapter_notes, keeps_ties, saved_lora
from steersman.model.adapters import adapted_folder, is_adapters
from steersman.model.lora import LoraConfig, add_lora, add_lora_to_trunk
from steersman.model.meaning import Meaning
from steersman.model.source import STATE_LAYERS, STATELESS_LAYERS, find, read_config
from steersman.types import SteersmanError

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
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
"""Names that configs of mixtures give to the number of experts, and to that of those that a token passes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Parameters in all, those that a token passes (`active`: a mixture has experts that it does not), those of the
    largest layer, and of the tables of vocabulary x hidden; and what a cache holds."""

    name: str
    parameters: int
    active: int
    largest_layer: int
    tables: int
    layers: int
    hidden: int
    cached: int
    """Numbers that one token leaves in the cache of one layer: keys and values."""
    inner: int = 0
    """Width between the matrices of a layer's feed-forward part, of all experts together that a token passes; 0 is
    not known, then four times `hidden`."""
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

    def scalar(self) -> Shape:
        """The same trunk under a head of one number: no output layer of words."""
        table = self.vocabulary * self.hidden
        more = self.hidden - (table if self.tables > table else 0)
        return replace(self, parameters=self.parameters + more, active=self.active + more, tables=table, vocabulary=0)

    def cache(self, length: float, number: int) -> float:
        """Bytes of one sequence's keys and values, with `number` bytes each."""
        return self.layers * self.cached * length * number


@dataclass(frozen=True, slots=True)
class Adapted:
    """Parameters that learn where adapters do: those of the adapters, which are in float32, and those of modules that
    are trained whole (a scalar model's head among them), which have the model's precision."""

    adapters: int
    whole: int

    @property
    def trained(self) -> int:
        return self.adapters + self.whole


def shape_of(path: str) -> Shape:
    """The shape of the model in a folder, of the one that a folder's adapters are on, or of one of `SIZES`."""
    return shape_from(_config(path), path)


def shape_from(config: Any, name: str) -> Shape:
    """The shape of a model of this config."""
    model = _without_weights(config)
    text = config.get_text_config()
    names = set(model._no_split_modules or ())
    layers = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names]
    tables = {id(e.weight): e.weight.numel() for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    widths, queries = key_widths(text), [heads * size for heads, _, size in _heads(text, text.num_hidden_layers)]
    parameters = sum(p.numel() for p in model.parameters())
    return Shape(
        name=name, parameters=parameters, active=parameters - _passed_by(model, text),
        largest_layer=max(layers, default=0), tables=sum(tables.values()), layers=text.num_hidden_layers,
        hidden=text.hidden_size, cached=round(2 * sum(widths) / text.num_hidden_layers), inner=_inner(text),
        query=round(sum(queries) / max(len(queries), 1)), heads=getattr(text, "num_attention_heads", 1),
        vocabulary=text.vocab_size,
    )  # fmt: skip


def adapted(path: str, lora: LoraConfig, *, scalar: bool = False) -> Adapted:
    """What learns of the model at the path under these adapters, or of a `scalar` model on its trunk: they are put on
    as a run puts them on. Adapters that the folder holds go on as they are, whatever `lora` says.

    Raises SteersmanError where the targets match no layer, and for a scalar model of a family that has none.
    """
    saved: Any = saved_lora(path)
    asked = lora if saved is None else LoraConfig(**{**saved, "train_whole": tuple(saved["train_whole"])})
    model = _without_weights(_config(path), scalar)
    with torch.device("meta"):
        if scalar:
            add_lora_to_trunk(model.base_model, asked)
        else:
            add_lora(model, asked, tied=keeps_ties(path))
    learned = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    adapters = sum(count for name, count in learned if ".lora_" in name)
    return Adapted(adapters, sum(count for _, count in learned) - adapters)


def attributes_of(path: str) -> tuple[str, ...]:
    """Names of the outputs of a reward model that has several; none where it gives one number."""
    source, local = find(path)
    if local and is_adapters(source):
        return adapted_folder(source).meaning.attributes
    return Meaning.of(_config(path)).attributes


def _config(path: str) -> Any:
    """The config of the model that a path names, dropout off."""
    if path.lower() in SIZES:
        return hf.LlamaConfig(**SIZES[path.lower()])
    source, local = find(path)
    if local and is_adapters(source):
        source, local = find(adapter_notes(source).base)
    return read_config(source, local, [])


def _without_weights(config: Any, scalar: bool = False) -> Any:
    """A model of this config on the meta device: the language model, or the classifier of one number."""
    if scalar:
        if type(config) not in hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise SteersmanError(
                f"a model of type '{config.model_type}' has no sequence classifier, so it can not be a reward model "
                "or a critic of its own"
            )
        config.num_labels = 1
        auto: Any = hf.AutoModelForSequenceClassification
    else:
        auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False)


def _experts(text: Any) -> tuple[int, int]:
    """Experts of a sparse layer, and how many of them a token passes; 1 and 1 where there are none."""
    counts, chosen = ([getattr(text, name, None) or 0 for name in names] for names in (EXPERTS, CHOSEN))
    return (max(counts), max(chosen)) if max(counts) > 1 and max(chosen) > 0 else (1, 1)


def _passed_by(model: Any, text: Any) -> int:
    """Parameters of the experts that a token does not pass."""
    count, chosen = _experts(text)
    inside = sum(
        p.numel()
        for name, p in model.named_parameters()
        if re.search(r"\.experts\.\d+\.", name) or (".experts." in name and p.ndim > 1 and p.shape[0] == count)
    )
    return inside - inside * chosen // count


def _inner(text: Any) -> int:
    """Width of a layer's feed-forward part, of the experts that a token passes together; 0 where it is not told."""
    width = getattr(text, "intermediate_size", None) or 0
    if isinstance(width, list):  # one for each layer
        width = max(width)
    count, chosen = _experts(text)
    if count == 1:
        return width
    one = getattr(text, "moe_intermediate_size", None) or width
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return (chosen + (getattr(text, "n_shared_experts", None) or 0)) * one + shared


def key_widths(text: Any) -> list[int]:
    """Numbers of a token's keys, and as many of its values, in each layer of a text config that keeps its own: layers
    may differ (Gemma 4), the last ones may read those of layers before (Gemma 3n), and some keep a state
    (`STATE_LAYERS`) or nothing."""
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
        if kind not in (*STATE_LAYERS, *STATELESS_LAYERS)
    ]
