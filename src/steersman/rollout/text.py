"""Response text, and stop strings found while it grows.

A token may be a part of a character. A response that a limit cuts, or that says such tokens in no order, leaves bytes
that make none: text shows each piece of them as one U+FFFD and keeps every whole character beside them. Bytes of one
response are never completed by those of another, so a text follows from the response's own ids.
"""

from __future__ import annotations

from typing import Any

CONTEXT = 8
"""Tokens before a response that are decoded with it: what a token adds can depend on the one before (a leading
space is dropped at the start of a text)."""
_BROKEN = "\ufffd"


class Texts:
    """Decodes responses as what they add to the prompt's text, and looks for stop strings.

    Special tokens are left out of the text, unless a stop string contains one.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        special = [] if tokenizer is None else tokenizer.all_special_tokens
        self.skip = not any(s in text for text in stop for s in special)
        # a stop string of n characters rarely needs more than n tokens; the margin is for tokens that show nothing
        self.window = max((len(s) for s in stop), default=0) * 2 + CONTEXT
        self.endings = {s[-1] for s in stop}
        self.may_end: dict[int, bool] = {}
        self.byte_ids = [] if tokenizer is None else _byte_tokens(tokenizer)
        self.byte_of = {token: byte for byte, token in enumerate(self.byte_ids)}

    def response(self, prompt: list[int], ids: list[int]) -> str:
        """The text that `ids` add after `prompt`."""
        if self.tokenizer is None or not ids:
            return ""
        context = prompt[-CONTEXT:]
        while (before := self._decode(context)).endswith(_BROKEN):
            context = context[:-1]
        whole = self._decode([*context, *ids])
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids)

    def stopped(self, prompt: list[int], ids: list[int]) -> str | None:
        """The response's text before the stop string that its last token completed; None where it did not.

        A stop string that an earlier token completed (while a minimum length held the end back) does not count.
        """
        if not self.stop or not self._may_complete(ids[-1]):
            return None
        tail = self.response([*prompt, *ids[: -self.window]], ids[-self.window :])
        if not any(s in tail for s in self.stop):
            return None
        text = self.response(prompt, ids)
        seen = len(self.response(prompt, ids[:-1]).rstrip(_BROKEN))
        cuts = [text.find(s, max(0, seen - len(s) + 1)) for s in self.stop]
        found = [cut for cut in cuts if cut >= 0]
        return text[: min(found)] if found else None

    def _may_complete(self, token: int) -> bool:
        """Whether the token's own text holds the last character of a stop string, or can not tell."""
        known = self.may_end.get(token)
        if known is None:
            piece = self._decode([token])
            unclear = not piece.strip() or _BROKEN in piece or any(end.isspace() for end in self.endings)
            known = self.may_end[token] = unclear or any(end in piece for end in self.endings)
        return known

    def _decode(self, ids: list[int]) -> str:
        text = self._as_decoded(ids)
        return self._as_decoded(self._mended(ids)) if self.byte_ids and _BROKEN in text else text

    def _as_decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip, clean_up_tokenization_spaces=False)

    def _mended(self, ids: list[int]) -> list[int]:
        """The ids with U+FFFD, in bytes, in the place of bytes that make no character.

        A tokenizer that falls back to bytes decodes a run of them together, and one that is no character would take
        all characters of its run along.
        """
        out, run = [], bytearray()
        for token in ids:
            if token in self.byte_of:
                run.append(self.byte_of[token])
            else:
                out += [*self._as_tokens(run), token]
                run.clear()
        return out + self._as_tokens(run)

    def _as_tokens(self, run: bytearray) -> list[int]:
        return [self.byte_ids[byte] for byte in run.decode("utf-8", "replace").encode()]


def _byte_tokens(tokenizer: Any) -> list[int]:
    """The tokens <0x00> to <0xFF> of a tokenizer that falls back to bytes, as Llama's does; else nothing."""
    found = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return found if len(set(found)) == 256 else []
