"""What the training verbs tell before they start: batch vocabulary, data, and models with their memory."""

from __future__ import annotations

from typing import Any

from steersman.data import Summary
from steersman.model import Headed, Policy
from steersman.run.device import device_text, resolve_dtype
from steersman.run.preflight import Memory, Preflight, Role, activation_memory, cache_memory, weight_memory
from steersman.train.session import Session


def describe_run(pre: Preflight, session: Session, batch: int, updates: int, data: Summary) -> None:
    """The lines that every offline verb has, and three rendered samples."""
    run = session.config
    pre.fact("run folder", str(session.path))
    pre.fact("device", device_text(session.device, resolve_dtype(session.recipe.model.dtype, session.device)))
    for line in data.lines:
        pre.fact("data", line)
    pre.fact("examples per update", batch)
    pre.fact("optimizer updates", updates)
    pre.fact("micro-batches", f"of up to {run.micro_tokens:,} padded tokens, sorted by length")
    for sample in data.samples:
        pre.sample(sample)


def policy_role(
    name: str, policy: Policy, source: str, tokens: int, length: int, *, trained: bool = True, rows: int = 0
) -> Role:
    """A causal model's row of the table; `rows` sequences sampled side by side need a cache."""
    return _role(name, policy.model, source, tokens, length, trained, rows)


def scalar_role(name: str, model: Headed, source: str, tokens: int, length: int, *, trained: bool = True) -> Role:
    """A reward model's or critic's row of the table."""
    return _role(name, model.model, source, tokens, length, trained, 0)


def _role(name: str, module: Any, source: str, tokens: int, length: int, trained: bool, rows: int) -> Role:
    config = module.config.get_text_config()
    parameters = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad) if trained else 0
    bytes_ = next(module.parameters()).element_size()
    weights, gradients, optimizer = weight_memory(parameters, trainable, weight_bytes=bytes_)
    heads, hidden = config.num_attention_heads, config.hidden_size
    activations = activation_memory(
        tokens=tokens, hidden=hidden, layers=config.num_hidden_layers, heads=heads, length=length,
        logit_rows=0, vocabulary=config.vocab_size, element_bytes=bytes_, trained=trained,
    )  # fmt: skip
    cache = cache_memory(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        rows=rows,
        length=length,
        element_bytes=bytes_,
    )
    return Role(name, source, parameters, trainable, Memory(weights, gradients, optimizer, activations, cache))
