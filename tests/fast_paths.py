"""Which faster ways of computing a model takes, found out by watching it read and write (importable)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steersman.model import reader
from steersman.model.fast import attention, fused, rotation
from steersman.model.policy import Policy
from steersman.model.probe import packs_exactly, probe_ids
from steersman.rollout import Engine, Sampling, decoder
from steersman.rollout.fast import compiled_step, packed
from steersman.types import Prompt, Tokens

LOOPS = {
    "norms": (fused, "rms_norm"),
    "gates": (fused, "gated"),
    "rotation": (rotation, "rotate"),
    "attention": (attention.sequences, "attend"),
    "attention of one token": (attention.decode, "decode_attention"),
    "rearranged weights": (packed, "product"),
}
"""Compiled loops: the module in which they are called, and their name there."""
PATHS = (
    "fused log-probabilities", "packed rows", "rows apart", "shared prompts", "narrowed last layer", "compiled steps",
    *LOOPS,
)  # fmt: skip
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "tie_word_embeddings": False, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "mamba_chunk_size": 8, "chunk_size": 8,
}  # fmt: skip


def small(family: str, **settings: Any) -> Any:
    """A small model of the family with random weights, heads 16 wide."""
    torch.manual_seed(0)
    known = type(AutoConfig.for_model(family))().to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in known}
    config = AutoConfig.for_model(family, **{**sizes, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


def paths_taken(model: Any) -> set[str]:
    """The faster ways that reading two samples of each of two prompts, and sampling them, goes."""
    policy = Policy(model, None)
    prompts = [[3 + i % 40 for i in range(n)] for n in (12, 9)]
    tokens = Tokens.from_ids([p for p in prompts for _ in range(2)], [[5, 6, 7, 8, 9], [7], [4, 5], [9, 8, 7]])
    with watched(model) as seen:
        with patch("steersman.model.reader.call_cost", lambda _device: 0):
            policy.logp(tokens)
        if "output layer" not in seen:
            seen.add("fused log-probabilities")
        Engine(model, eos_token_id=()).generate([Prompt(ids, "") for ids in prompts], Sampling(40), n=2)
    if packs_exactly(policy.form.trunk, probe_ids(model)):
        seen.add("packed rows")
    joined: Any = policy.reader
    if joined.feed_forward:
        seen.add("narrowed last layer")
    if joined.keeps_apart:
        seen.add("rows apart")
    return seen & set(PATHS)


@contextmanager
def watched(model: Any) -> Iterator[set[str]]:
    """The names of what was called meanwhile."""
    seen: set[str] = set()

    def noting(name: str, inner: Any) -> Any:
        return lambda *args, **named: (seen.add(name), inner(*args, **named))[1]

    def step(self: Any, *args: Any) -> Any:
        if self.verified:
            seen.add("compiled steps")
        return one_step(self, *args)

    one_step = compiled_step.CompiledStep.__call__
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: seen.add("output layer"))
    with ExitStack() as stack:
        stack.callback(handle.remove)
        for name, (where, function) in LOOPS.items():
            stack.enter_context(patch.object(where, function, noting(name, getattr(where, function))))
        stack.enter_context(patch.object(compiled_step.CompiledStep, "__call__", step))
        # the model is quick already, and trying its modules again would count
        stack.enter_context(patch.object(decoder, "quick", lambda _: nullcontext()))
        for name in ("read_shared", "read_shared_apart"):
            stack.enter_context(patch.object(reader, name, noting("shared prompts", getattr(reader, name))))
        yield seen
