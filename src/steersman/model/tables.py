"""Which weights of a model are no matrices between two layers of it: embeddings, output layers, adapters, vectors."""

from __future__ import annotations

from torch import nn


def tables_and_adapters(module: nn.Module) -> list[nn.Parameter]:
    """The embeddings, output layers (of words or scores) and adapters of every model inside the module, which Muon
    leaves to AdamW: its updates treat all directions of a matrix alike (arXiv 2502.16982, section 2.2)."""
    outputs = {id(part) for model in module.modules() for part in _outputs(model)}
    whole = [part for part in module.modules() if isinstance(part, nn.Embedding) or id(part) in outputs]
    found = [p for part in whole for p in part.parameters()]
    return found + [p for name, p in module.named_parameters() if ".lora_" in name]


def stacked_vectors(module: nn.Module) -> list[nn.Parameter]:
    """The vectors of every model inside the module that may be stored as matrices: biases (gpt-oss has a row for each
    expert), the decay rates and skips of state-space layers (`A_log`, `D`), and what a family marks
    `_no_weight_decay`. Weight decay is not meant for them, and Muon leaves them to AdamW."""
    return [
        p
        for name, p in module.named_parameters()
        if name.endswith(("bias", ".A_log", ".D")) or getattr(p, "_no_weight_decay", False)
    ]


def _outputs(model: nn.Module) -> list[nn.Module]:
    """What gives words or scores in a model of transformers; a critic's head on the policy's states."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return [part for name, part in model.named_children() if name == "value_head"]
    heads = [part for name, part in model.named_children() if name in ("score", "classification_head")]
    words = model.get_output_embeddings()
    return heads if words is None else [*heads, words]
