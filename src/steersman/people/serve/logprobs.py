"""Log-probabilities of an answer's tokens in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steersman.rollout.responses import TokenLogp

LOWEST = -9999.0
"""Stands for a probability of 0, which JSON can not hold as a logarithm."""


def chat_logprobs(ids: list[int], told: list[TokenLogp], piece: Callable[[int], str]) -> dict[str, Any]:
    """As /v1/chat/completions lists them."""

    def entry(token: int, logp: float) -> dict[str, Any]:
        text = piece(token)
        return {"token": text, "logprob": max(logp, LOWEST), "bytes": list(text.encode(errors="replace"))}

    content = [
        entry(token, one.logp) | {"top_logprobs": [entry(i, x) for i, x in one.others]}
        for token, one in zip(ids, told, strict=True)
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    ids: list[int], told: list[TokenLogp], piece: Callable[[int], str], offset: int
) -> dict[str, list[Any]]:
    """As /v1/completions lists them; `offset` is where the first token's text begins."""
    tokens = [piece(token) for token in ids]
    offsets = [offset]
    for text in tokens:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": tokens, "token_logprobs": [max(one.logp, LOWEST) for one in told],
        "top_logprobs": [{piece(i): max(x, LOWEST) for i, x in one.others} for one in told],
        "text_offset": offsets[:-1],
    }  # fmt: skip
