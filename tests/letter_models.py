"""The smallest models that can write, with one token per letter; and the files that tests of the loops begin from."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = ["<unk>", "<s>", "</s>", *string.ascii_lowercase, " ", ".", ",", "\n", "!", "?"]
WORDS = [
    "the cat",
    "a dog sat",
    "we",
    "look at",
    "no",
    "she said so",
    "hm,",
    "it is",
    "you and me",
    "oh",
    "up",
    "far",
]


def letters(eos: str | None = "</s>", vocabulary: list[str] = LETTERS) -> PreTrainedTokenizerFast:
    """One token per letter; no pad token."""
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token=eos)


def save_mini(folder: Path, seed: int = 0, context: int = 64, head_dim: int = 8) -> Path:
    """The smallest Llama that still has every part: one layer, 16 wide."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=head_dim, max_position_embeddings=context, bos_token_id=1, eos_token_id=2,
        pad_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)


def save_chat_mini(folder: Path, context: int, template: str = CHAT_TEMPLATE) -> Path:
    """`save_mini`, whose tokenizer has a chat template."""
    save_mini(folder, context=context)
    tokenizer = letters()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
