"""Tiny reward models of words, and samples for them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from steersman.types import Prompt, Sample

WORDS = ["<pad>", "<bos>", "<eos>", "the", "cat", "was", "happy", "sad", "and", "then"]


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


def classifier(family: str, context: int = 32, vocab: int = 16):
    torch.manual_seed(0)
    small = {"vocab_size": vocab, "num_labels": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(n_positions=context, n_embd=16, n_layer=2, n_head=2, **small, **dropout)
        model = GPT2ForSequenceClassification(config)
    else:
        config = LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=context, **small,
        )  # fmt: skip
        model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)
    return model.eval()


def sample(prompt: str, response: str, tokenizer, finish="eos") -> Sample:
    ids = tokenizer(response)["input_ids"] + ([tokenizer.eos_token_id] if finish == "eos" else [])
    return Sample(Prompt(tokenizer(prompt)["input_ids"], prompt), ids, [0.0] * len(ids), finish, response)
