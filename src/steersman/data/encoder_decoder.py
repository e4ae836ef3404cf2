"""Prompts and answers for an encoder-decoder: two texts, each with a beginning of its own.

The prompt is laid out as the tokenizer lays out any text, with what it puts in front and behind (T5 ends a source
with its end token). The answer starts a text too: no space is taken off its first word, nothing is put in front
(what a decoder always starts with is read, not written), and the end token comes last, once, and counts.
"""

from __future__ import annotations

from typing import Any

from steersman.data.examples import Content
from steersman.data.tokenize import Layout, Room, smallest
from steersman.data.tools import CALLS, THOUGHTS
from steersman.types import SteersmanError


class PairLayout(Layout):
    """The layout of an encoder-decoder whose decoder reads `start` tokens before an answer."""

    joined = False

    def __init__(self, tokenizer: Any, *, start: int, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)
        self.start = start

    def prompt(self, content: Content) -> tuple[list[int], str]:
        ids, text = super().prompt(content)
        end = self.codec.suffix
        return (ids if end and ids[-len(end) :] == end else ids + end), text

    def answer(self, prompt: Content, completion: Content) -> tuple[list[int], list[int], list[bool]]:
        """Ids of the prompt, ids of the response, and which response tokens count: all.

        Raises SteersmanError for text alone, and for a completion of more than one turn.
        """
        if not prompt:
            raise SteersmanError(
                "an encoder-decoder answers a prompt, and this row is text alone; give rows of prompt and "
                "completion, or make the prompt from columns with data.prompt_template"
            )
        if not isinstance(completion, str):
            if len(completion) != 1:
                raise SteersmanError(
                    f"an encoder-decoder writes one answer, and this row's completion has {len(completion)} turns; "
                    "cut conversations so that each ends in one reply"
                )
            told = [name for name in (*CALLS, *THOUGHTS) if name in completion[0]]
            if told:
                raise SteersmanError(
                    f"an encoder-decoder writes text alone, and this row's answer has {told[0]} too; leave it out"
                )
            completion = completion[0]["content"]
        response = self.codec.finish(completion, eos=self.append_eos, opens=True)
        return self.prompt(prompt)[0], response, [True] * len(response)

    def room(self, max_prompt: int | None, max_length: int | None, context: int | None) -> Room:
        """Encoder and decoder have a context each; `max_length` is of both together."""
        return Room(smallest(max_prompt, context), None if context is None else context - self.start, max_length)

    def prompt_room(self, max_prompt: int | None, context: int | None, new_tokens: int) -> int | None:
        room = self.room(max_prompt, None, context)
        if room.response is not None and new_tokens > room.response:
            raise SteersmanError(
                f"{new_tokens} new tokens do not fit the decoder's context, which has room for {room.response}; "
                "lower rollout.max_new_tokens"
            )
        return room.prompt
