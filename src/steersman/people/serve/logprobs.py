"""Log-probabilities of an answer's tokens in OpenAI's two shapes."""

from __future__ import annotations

import codecs
import re
from typing import Any

from steersman.rollout.responses import TokenLogp

LOWEST = -9999.0
"""Stands for a probability of 0, which JSON can not hold as a logarithm."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_LETTERS = {chr(byte): byte for byte in _PLAIN} | {
    chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(_PLAIN)))
}
"""The byte of each letter in the vocabulary of a tokenizer that cuts bytes, as GPT-2's does."""


class TokenBytes:
    """What single tokens are: their bytes, and a name that tells them apart where they are parts of a character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def of(self, token: int) -> bytes:
        """The token's bytes. The vocabulary has those of a part of a character: one as <0xE2>, or a letter each."""
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if "\ufffd" not in text:
            return text.encode(errors="replace")
        entry = str(self.tokenizer.convert_ids_to_tokens(token))
        single = _BYTE.fullmatch(entry)
        if single is not None:
            return bytes.fromhex(single[1])
        return bytes(_LETTERS[c] for c in entry) if all(c in _LETTERS for c in entry) else text.encode()

    def name(self, token: int) -> str:
        r"""The token's text; bytes that are no text as OpenAI's completions write them, bytes:\xf0\x9f."""
        raw = self.of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Offsets:
    """Where the tokens of one answer begin in its text, in characters; one within a character where that begins."""

    def __init__(self) -> None:
        self.at, self._decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, raw: bytes) -> int:
        """The place of the next token, of these bytes."""
        if raw and not 0x80 <= raw[0] < 0xC0:  # it goes on with no character, so one that was begun is broken
            self.at += len(self._decoder.decode(b"", final=True))
        begin = self.at
        self.at += len(self._decoder.decode(raw))
        return begin


def chat_logprobs(ids: list[int], told: list[TokenLogp], tokens: TokenBytes) -> dict[str, Any]:
    """As /v1/chat/completions lists them."""

    def entry(token: int, logp: float) -> dict[str, Any]:
        return {"token": tokens.name(token), "logprob": max(logp, LOWEST), "bytes": list(tokens.of(token))}

    content = [
        entry(token, one.logp) | {"top_logprobs": [entry(i, x) for i, x in one.others]}
        for token, one in zip(ids, told, strict=True)
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    ids: list[int], told: list[TokenLogp], tokens: TokenBytes, offsets: Offsets
) -> dict[str, list[Any]]:
    """As /v1/completions lists them; `offsets` has seen the answer's tokens before these.

    Of likeliest tokens with one name the likelier one is listed.
    """
    return {
        "tokens": [tokens.name(token) for token in ids], "token_logprobs": [max(one.logp, LOWEST) for one in told],
        "top_logprobs": [{tokens.name(i): max(x, LOWEST) for i, x in reversed(one.others)} for one in told],
        "text_offset": [offsets.next(tokens.of(token)) for token in ids],
    }  # fmt: skip
