"""Tiny models of each supported family, for tests of every room (importable, unlike one of many conftests)."""

from __future__ import annotations

import torch


def tiny_config(family: str, vocab: int = 97):
    """A config of the family, small enough for exact tests; dropout off."""
    from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

    common = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocab, n_positions=128, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
    if family == "llama":
        return LlamaConfig(**common)
    if family == "qwen2":
        return Qwen2Config(**common)
    if family == "qwen3":
        return Qwen3Config(**common, head_dim=8)
    if family == "gemma3":
        # a sliding window shorter than the test sequences, on every other layer
        return Gemma3TextConfig(
            **common, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        )
    raise ValueError(family)


FAMILIES = ["gpt2", "llama", "qwen2", "qwen3", "gemma3"]
PAIR_FAMILIES = ["t5", "bart"]
"""Encoder-decoder families whose tests always run; `tiny_pair_config` knows more."""


def tiny_pair_config(family: str, vocab: int = 97):
    """A config of an encoder-decoder family; T5's decoder starts with its pad, BART's with its eos."""
    from transformers import (
        BartConfig,
        MarianConfig,
        MBartConfig,
        MT5Config,
        PegasusConfig,
        T5Config,
        T5GemmaConfig,
        UMT5Config,
    )

    if family == "t5gemma":  # no decoder_start_token_id: its decoder starts with the decoder's BOS
        stack = {
            "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
            "sliding_window": 4, "query_pre_attn_scalar": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "dropout_rate": 0.0, "attention_dropout": 0.0,
        }  # fmt: skip
        return T5GemmaConfig(
            encoder=dict(stack), decoder=dict(stack), vocab_size=vocab, dropout_rate=0.0, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
    if family in ("t5", "t5-gated", "mt5", "umt5"):
        kind = {"mt5": MT5Config, "umt5": UMT5Config}.get(family, T5Config)
        # an untied head has no scale before it; the decoder is deeper than the encoder
        form = {} if family == "t5" else {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        return kind(
            vocab_size=vocab, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=2, num_heads=4,
            relative_attention_num_buckets=8, relative_attention_max_distance=16, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **form,
        )  # fmt: skip
    kind = {"bart": BartConfig, "mbart": MBartConfig, "pegasus": PegasusConfig, "marian": MarianConfig}[family]
    return kind(
        vocab_size=vocab, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        decoder_start_token_id=0 if family == "marian" else 2, forced_eos_token_id=None,
    )  # fmt: skip


def allowed_ids(support: torch.Tensor, vocab: int) -> set[int]:
    """Which ids one token's support allows: those listed, or all but those listed as ~id."""
    listed = {*support.tolist()}
    return listed if any(i >= 0 for i in listed) else {*range(vocab)} - {~i for i in listed}


def tiny_model(family: str, vocab: int = 97, seed: int = 0, scale: float = 3.0):
    """A randomly initialised model whose logits are spread enough to make mistakes visible."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(seed)
    if family in FAMILIES:
        model = AutoModelForCausalLM.from_config(tiny_config(family, vocab))
    else:
        model = AutoModelForSeq2SeqLM.from_config(tiny_pair_config(family, vocab))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn(1, vocab))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    return model.eval()
