"""Text -> token ids, so that what is trained on is what is sampled from.

Prompt and completion are tokenised apart and joined: the prompt's ids then never depend on the answer, and are
the very ids that a rollout starts from. (Tokenised jointly, a merge across the boundary could change the
prompt's last token, and the policy would be trained on prompts that it never meets.) The price is that the
boundary is a fixed cut: a prompt that ends in a space usually leaves that space as a token of its own.

- The beginning: what the tokenizer itself puts in front (a BOS where it adds one), exactly once.
- The end: the end token, exactly once, and it counts in the loss, so that stopping is learned.
- Tokenizers that put a space in front of every text (SentencePiece's) do so for the prompt only; a
  completion is encoded behind an anchor that is taken off again, so that decoding gives the text back.
- Special tokens written in the data's own text ("<|im_end|>") are read as ordinary characters unless
  `allow_special_tokens`; a BOS or EOS string that repeats the one added here is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from steersman.data.examples import Content, Message, user
from steersman.data.template import ChatTemplate, chat_template, pieces, special_tokens, unfenced
from steersman.data.tools import require_shown
from steersman.types import SteersmanError

_ANCHORS = ("\n", "a", "0")


class Codec:
    """A tokenizer with its habits at the beginning of a text known and undone where they do not belong.

    `prefix` and `suffix` are the ids that it puts around every text by itself; `suffix` is used for the prompts of
    encoder-decoders alone. `eos_id` is None where it has no end token.
    """

    def __init__(self, tokenizer: Any, *, allow_special_tokens: bool = False) -> None:
        self.tokenizer = tokenizer
        self.allow_special_tokens = allow_special_tokens
        self.eos_id: int | None = tokenizer.eos_token_id
        others = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        self.unknown_id: int | None = None if tokenizer.unk_token_id in others else tokenizer.unk_token_id
        self.special = special_tokens(tokenizer)
        self.special_ids = set(tokenizer.convert_tokens_to_ids(list(self.special)))
        with_added = tokenizer.encode("a", add_special_tokens=True)
        bare = tokenizer.encode("a", add_special_tokens=False)
        starts = (i for i in range(len(with_added)) if with_added[i : i + len(bare)] == bare)
        at = next(starts, 0)
        self.prefix: list[int] = with_added[:at]
        self.suffix: list[int] = with_added[at + len(bare) :]
        self.spaced = self._encode("\na")[len(self._encode("\n")) :] != bare

    def begin(self, text: str) -> list[int]:
        """Ids of a text at the beginning of a sequence, what the tokenizer puts in front included, once."""
        return self.prefix + self._encode(self._without_bos(text))

    def more(self, text: str, *, control: bool = False) -> list[int]:
        """Ids of a text that continues another one, without a space that is not its own.

        With `control`, special tokens in the text are read as such (a template wrote them).
        """
        if not text:
            return []
        if self.spaced:
            for anchor in _ANCHORS:
                head, whole = self._encode(anchor), self._encode(anchor + text, control)
                if whole[: len(head)] == head:
                    return whole[len(head) :]
        return self._encode(text, control)

    def finish(self, text: str, *, eos: bool = True, opens: bool = False) -> list[int]:
        """Ids of an answer with the end token, once; it continues another text unless it `opens` one."""
        name = self.tokenizer.eos_token
        if eos and name and not self.allow_special_tokens:
            text = text.removesuffix(name)
        ids = self._encode(text) if opens else self.more(text)
        if not eos:
            return ids
        if self.eos_id is None:
            raise SteersmanError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no end token, so the end can not be learned; "
                "set tokenizer.eos_token, or data.append_eos: false"
            )
        return ids if ids[-1:] == [self.eos_id] else [*ids, self.eos_id]

    def rendered(self, text: str, *, first: bool, own_template: bool) -> list[int]:
        """Ids of a piece that a chat template wrote, fenced special tokens in it read as ordinary text."""
        ids: list[int] = []
        for i, (piece, fenced) in enumerate(pieces(text)):
            opens = first and i == 0
            if opens and own_template:  # the template itself writes a BOS where it wants one
                ids += self._encode(piece, control=True)
            elif opens:
                ids += self.prefix + self._encode(piece, control=True)
            else:
                ids += self.more(piece, control=not fenced)
        return ids

    def decode(self, ids: list[int], *, after: bool = True) -> str:
        """Text of ids without special tokens; `after` says that they continue another text."""
        if not (after and self.spaced):
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        head = self._encode(_ANCHORS[0])
        whole = self.tokenizer.decode(head + list(ids), skip_special_tokens=True)
        return whole.removeprefix(self.tokenizer.decode(head, skip_special_tokens=True))

    def has_special(self, content: Content) -> bool:
        """True where the data's text spells a special token: what is said, a thought, a call, a tool."""
        parts = [content] if isinstance(content, str) else [x for m in content for k, x in m.items() if k != "role"]
        return any(name in text for part in parts for text in _texts(part) for name in self.special)

    def _encode(self, text: str, control: bool = False) -> list[int]:
        split = not (control or self.allow_special_tokens)
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split)

    def _without_bos(self, text: str) -> str:
        name, bos = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        return text.removeprefix(name) if name and bos in self.prefix else text


def _texts(value: object) -> Iterator[str]:
    """Every text in a value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, x in value.items():
            yield from (*_texts(name), *_texts(x))
    elif isinstance(value, list):
        for x in value:
            yield from _texts(x)


@dataclass(frozen=True, slots=True)
class Room:
    """How many tokens fit: of a prompt, of a response, of both together. None is no limit."""

    prompt: int | None
    response: int | None
    both: int | None


class Layout:
    """Prompts and answers -> ids and masks, for text (no template) and conversations (the chat template).

    `joined` says that a model reads prompt and answer as one sequence.
    """

    joined: ClassVar[bool] = True

    def __init__(
        self,
        tokenizer: Any,
        *,
        append_eos: bool = True,
        allow_special_tokens: bool = False,
        wrap_in_chat: bool = False,
        assistant_turns: Literal["all", "last"] = "all",
    ) -> None:
        self.codec = Codec(tokenizer, allow_special_tokens=allow_special_tokens)
        self.template: ChatTemplate = chat_template(tokenizer, allow_special_tokens=allow_special_tokens)
        self.append_eos = append_eos
        self.wrap_in_chat = wrap_in_chat
        self.assistant_turns: Literal["all", "last"] = assistant_turns

    def prompt(self, content: Content) -> tuple[list[int], str]:
        """Ids of a prompt, and the text that the model sees."""
        if isinstance(content, str) and not self.wrap_in_chat:
            return self.codec.begin(content), content
        turns = self._turns(content)
        require_shown(self.template.render, turns)
        shown = self.template.render(turns, for_reply=True)
        ids = self.codec.rendered(shown, first=True, own_template=self.template.own)
        return ids, unfenced(shown)

    def answer(self, prompt: Content, completion: Content) -> tuple[list[int], list[int], list[bool]]:
        """Ids of the prompt, ids of the response, and which response tokens count.

        Of a conversation the assistant's turns in `completion` count, those in `prompt` do not. Text alone (an
        empty prompt) gives its first token to the prompt and counts all others.
        """
        if isinstance(completion, str) and not prompt:
            return self._text(completion)
        if isinstance(prompt, str) and isinstance(completion, str) and not self.wrap_in_chat:
            response = self.codec.finish(completion, eos=self.append_eos)
            return self.codec.begin(prompt), response, [True] * len(response)
        turns = self._turns(prompt)
        reply: list[Message] = (
            [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        )
        return self._chat([*turns, *reply], len(turns))

    def room(self, max_prompt: int | None, max_length: int | None, context: int | None) -> Room:
        """What fits, by the data section's limits and the model's context."""
        return Room(max_prompt, None, smallest(max_length, context))

    def prompt_room(self, max_prompt: int | None, context: int | None, new_tokens: int) -> int | None:
        """The longest prompt that leaves room for `new_tokens`. Raises SteersmanError where there is none."""
        limit = smallest(max_prompt, None if context is None else context - new_tokens)
        if limit is not None and limit < 1:
            raise SteersmanError(
                f"{new_tokens} new tokens leave no room for a prompt in a context of {context} tokens"
            )
        return limit

    def cut(self, ids: list[int], limit: int, side: Literal["auto", "left", "right"]) -> list[int]:
        """A prompt's ids without those at one side that are too many; what the tokenizer puts around every text
        stays, and one id of the text at least. `auto` is left, or right where the prompt is an encoder's source."""
        head = self.codec.prefix if ids[: len(self.codec.prefix)] == self.codec.prefix else []
        tail = [] if self.joined else self.codec.suffix
        body = ids[len(head) : len(ids) - len(tail)]
        keep = max(limit - len(head) - len(tail), min(1, len(body)))
        left = side == "left" or (side == "auto" and self.joined)
        return head + (body[len(body) - keep :] if left and len(body) > keep else body[:keep]) + tail

    def _turns(self, content: Content) -> list[Message]:
        return user(content) if isinstance(content, str) else content

    def _text(self, text: str) -> tuple[list[int], list[int], list[bool]]:
        name = self.codec.tokenizer.eos_token
        if self.append_eos and name and not self.codec.allow_special_tokens:
            text = text.removesuffix(name)
        ids = self.codec.begin(text)
        end = self.codec.finish("", eos=self.append_eos)
        ids = ids if ids[-1:] == end else ids + end
        return ids[:1], ids[1:], [True] * (len(ids) - 1)

    def _chat(self, messages: list[Message], start: int) -> tuple[list[int], list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        spoke = False  # the last piece was the assistant's and its end token is not yet seen
        for segment in self.template.segments(messages, start, self.assistant_turns):
            piece = self.codec.rendered(segment.text, first=not ids, own_template=self.template.own)
            if segment.counts:
                counted = self._spoken(piece)
                spoke = counted == len(piece) and not (piece and piece[-1] in self.codec.special_ids)
                mask += [True] * counted + [False] * (len(piece) - counted)
            else:
                # a template's own marks may leave the end token outside; it counts all the same
                ends = spoke and bool(piece) and piece[0] in self.codec.special_ids
                mask += [ends] * bool(piece) + [False] * (len(piece) - 1)
                spoke = spoke and not ends
            ids += piece
        if True not in mask:
            raise SteersmanError("the chat template writes nothing for the assistant's turns of this conversation")
        first, last = mask.index(True), len(mask) - mask[::-1].index(True)
        ids, mask = ids[:last], mask[:last]
        if spoke and self.append_eos:
            ids, mask = ids + self.codec.finish(""), [*mask, True]
        return ids[:first], ids[first:], mask[first:]

    def _spoken(self, piece: list[int]) -> int:
        """How many tokens of a turn the assistant says: up to its end token, not the line break after it."""
        ends = [i for i, token in enumerate(piece) if token in self.codec.special_ids]
        if ends and not self.codec.tokenizer.decode(piece[ends[-1] + 1 :]).strip():
            return ends[-1] + 1
        return len(piece)


def smallest(*limits: int | None) -> int | None:
    """The least of the limits that are given."""
    return min((limit for limit in limits if limit is not None), default=None)
