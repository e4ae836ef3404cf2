"""The text of a response while it grows, decoded piece by piece."""

from __future__ import annotations

from steersman.rollout.text import CONTEXT, Texts


class SettledText:
    """What later tokens can not change any more: no half of a character, no stop string and no beginning of one.

    Each token is decoded once or a few times, whatever the length of the response.
    """

    def __init__(self, texts: Texts, prompt: list[int]) -> None:
        self.texts, self.before = texts, prompt[-CONTEXT:]
        self.text, self.read = "", 0

    def after(self, ids: list[int]) -> str:
        """The settled text of all tokens so far; `ids` are those of the last call and more."""
        fresh = ids[self.read :]
        piece = self.texts.response(self.before, fresh)
        if fresh and not piece.endswith("\ufffd"):
            self.before, self.read = [*self.before, *fresh][-CONTEXT:], len(ids)
            self.text += piece
            piece = ""
        text = self.text + piece.rstrip("\ufffd")
        stop = self.texts.stop
        begun = ((s, n) for s in stop for n in range(1, min(len(s), len(text) + 1)))
        hold = max((n for s, n in begun if text.endswith(s[:n])), default=0)
        return text[: min([len(text) - hold, *(text.index(s) for s in stop if s in text)])]
