"""Prompts, a tokenizer, and oracles that know nothing of the engine."""

from __future__ import annotations

import math
import random
import string

import torch

from steersman.types import Prompt

ENDS = (2, 11, 12, 13, 14)
"""End tokens for random models: often enough that rows leave at different times."""

CHARS = ["<pad>", "<s>", "</s>", *string.printable[:92], "ab", "\n\n"]


def ragged(count: int = 11, longest: int = 19, vocab: int = 97, seed: int = 0) -> list[Prompt]:
    """Prompts of very different lengths, one token the shortest."""
    r = random.Random(seed)
    lengths = [1, longest, *(r.randint(1, longest) for _ in range(count - 2))]
    return [Prompt([r.randrange(3, vocab) for _ in range(k)], "", index=i) for i, k in enumerate(lengths)]


def character_tokenizer():
    """One token per printable character, plus two of two characters; pad is eos."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({c: i for i, c in enumerate(CHARS)}, unk_token="<pad>"))
    inner.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<pad>"
    )


def plain_logits(model, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Logits [T, V] that predict each response token, by one unpadded, uncached forward."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            decoder = torch.tensor([[model.config.decoder_start_token_id, *ids[:-1]]])
            return model(torch.tensor([prompt]), decoder_input_ids=decoder).logits[0].double()
        logits = model(torch.tensor([prompt + ids])).logits[0]
    return logits[len(prompt) - 1 : -1].double()


def allowed(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The tokens that a row of tempered logits [V] may give, by sorting and counting."""
    ids = sorted(range(len(logits)), key=lambda v: -logits[v].item())
    ids = [v for v in ids if logits[v] > -math.inf]
    if top_k:
        ids = ids[:top_k]
    p = torch.softmax(logits[ids], 0).tolist()
    if top_p < 1:
        mass, count = 0.0, 0
        while mass < top_p and count < len(p):
            mass, count = mass + p[count], count + 1
        ids, p = ids[:count], p[:count]
    return {v for v, q in zip(ids, p, strict=True) if q >= min_p * p[0]}


def oracle_logp(logits: torch.Tensor, ids: list[int], sets: list[set[int]]) -> list[float]:
    """log p of each token under its row of tempered logits, renormalised over the row's allowed tokens."""
    out = []
    for row, token, some in zip(logits, ids, sets, strict=True):
        z = torch.logsumexp(row[sorted(some)], 0)
        out.append((row[token] - z).item() if token in some else -math.inf)
    return out
