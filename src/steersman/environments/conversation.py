"""Conversations as token ids: what was sampled stays as it was sampled, and only what is new is tokenised, once.

A template that is rendered again after each turn may write the model's own words otherwise than it said them
(trimmed, without thoughts, calls in other spacing), and text that is tokenised again may fall into other tokens. The
policy would be trained on what it never saw. So a conversation only grows: the sampled ids are kept, and behind them
comes what the template writes between a reply and the next one, rendered behind a stand-in for the reply.

`rewriting` tells which templates show earlier turns otherwise than they were said. They are refused by name; or kept
as said (`environment.history: keep`): exact in training, but not what the template shows to others later; or shown as
the template has it (`history: segments`): a conversation ends where the template rewrites it, and another begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steersman.data import Layout
from steersman.data.examples import Message
from steersman.data.template import unfenced
from steersman.types import Prompt, Sample, Segment, SteersmanError, Turn

_STAND_IN = "reply"
_THOUGHT = "<think>\nthought\n</think>\n\n" + _STAND_IN


class TurnLayout:
    """How turns become ids for one tokenizer: by its chat template, or as plain text one behind the other.

    `joined` says that a model reads all turns as one sequence; an encoder-decoder reads everything before a turn with
    its encoder, each time anew. `ends` are the ids that end a
    reply. `tail` is what the template writes behind a reply, its end token first. `system_turns` tells whether a
    system turn is shown.
    """

    def __init__(self, layout: Layout, ends: Sequence[int]) -> None:
        self.codec, self.template, self.chat = layout.codec, layout.template, layout.wrap_in_chat
        self.ends = frozenset(ends)
        self.joined, self.suffix = layout.joined, [] if layout.joined else layout.codec.suffix
        self.tail = ""
        if self.chat:
            talk: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _STAND_IN}]
            self.tail = unfenced(self.template.render(talk)).rpartition(_STAND_IN)[2]
        self.system_turns = not self.chat or self._shows_system_turns()

    def _shows_system_turns(self) -> bool:
        try:
            return _STAND_IN in self.template.render(
                [{"role": "system", "content": _STAND_IN}, {"role": "user", "content": "a"}]
            )
        except SteersmanError:
            return False

    def first(self, messages: Sequence[Message]) -> tuple[list[int], str]:
        """Ids and text of what the model is asked first."""
        if not self.chat:
            text = "".join(m["content"] for m in messages)
            return self._closed(self.codec.begin(text)), text
        shown = self.template.render(messages, for_reply=True)
        ids = self.codec.rendered(shown, first=True, own_template=self.template.own)
        return self._closed(ids), unfenced(shown)

    def _closed(self, ids: list[int]) -> list[int]:
        """With what an encoder-decoder's tokenizer puts behind every text."""
        return ids if not self.suffix or ids[-len(self.suffix) :] == self.suffix else ids + self.suffix

    def between(
        self, first: Sequence[Message], reply: Message, new: Sequence[Message], *, ended: bool
    ) -> tuple[list[int], str]:
        """Ids and text of what stands between a reply and the next one; `ended`: the reply has its end token.

        Raises SteersmanError where the template does not begin with what stood before.
        """
        if not self.chat:
            text = "".join(m["content"] for m in new)
            return self.codec.more(text), text
        frame = [*first, reply]
        before, after = self.template.render(frame), self.template.render([*frame, *new], for_reply=True)
        if not after.startswith(before):
            raise SteersmanError(_difference(before, after))
        tail = self.tail
        if ended:
            opening = next((name for name in self.codec.special if tail.startswith(name)), "")
            tail = tail.removeprefix(opening)
        # the tail is the template's own text, and so is read with its special tokens; what is new comes fenced
        text = tail + after[len(before) :]
        return self.codec.rendered(text, first=False, own_template=True), unfenced(text)

    def rewriting(self, first: Sequence[Message], new: Sequence[Message]) -> str | None:
        """How the template shows earlier turns otherwise than they were said; None where it does not.

        Two replies are tried, with `new` between them: one plain, one with a thought where the template knows them.
        """
        if not self.chat:
            return None
        thinks = "think" in self.template.source
        for reply in (_STAND_IN, _THOUGHT) if thinks else (_STAND_IN,):
            said: Message = {"role": "assistant", "content": reply}
            try:
                shown = self.template.render(first, for_reply=True)
                opened = shown.rstrip().endswith("<think>")
                words = reply.removeprefix("<think>\n") if opened and reply is _THOUGHT else reply
                if opened and reply is _STAND_IN:
                    continue  # the reply is never without a thought
                expected = shown + words + self.tail
                talk = [*first, said]
                again = self.template.render([*talk, *new], for_reply=True)
                if not again.startswith(expected):
                    return _difference(expected, again)
                shown = again + words + self.tail
                third = self.template.render([*talk, *new, said, *new], for_reply=True)
                if not third.startswith(shown):
                    return _difference(shown, third)
            except SteersmanError as error:
                return str(error)
        return None

    def rewritten(self, before: Sequence[Message], reply: str, after: Sequence[Message]) -> bool:
        """Whether the template, shown what comes after a reply, shows the reply or what stood before it otherwise."""
        shown = unfenced(self.template.render(before, for_reply=True)) + reply + self.tail
        return not unfenced(self.template.render(after, for_reply=True)).startswith(shown)

    def stand_in(self, calls: Sequence[Any] = ()) -> Message:
        """An assistant's turn in the place of a reply, with its calls."""
        made: Message = {"role": "assistant", "content": _STAND_IN}
        if calls:
            made["tool_calls"] = list(calls)
        return made


def _difference(was: str, now: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    old, new = (repr(unfenced(text[max(0, at - 20) : at + 30])) for text in (was, now))
    return f"...{old} becomes ...{new}"


@dataclass(slots=True)
class Conversation:
    """One episode as ids: the prompt, and behind it what was said and heard.

    `mask` is True on what the policy sampled. `logp` is 0 and `support` one id where the environment wrote.
    """

    layout: TurnLayout
    prompt: Prompt
    first: list[Message]
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    support: list[Tensor] | None = None
    turns: list[Turn] = field(default_factory=list)
    text: str = ""

    def context(self) -> list[int]:
        """Everything so far: what the next reply is sampled behind."""
        return [*self.prompt.ids, *self.ids]

    def copy(self) -> Conversation:
        """The same, to be gone on with apart from this one."""
        kept = {"ids": [*self.ids], "logp": [*self.logp], "mask": [*self.mask], "version": [*self.version]}
        return replace(self, turns=[*self.turns], **kept)

    def add_reply(self, sample: Sample) -> None:
        """Takes over a sampled reply, id by id."""
        begin = len(self.ids)
        if sample.support is not None or self.support is not None:
            self.support = self._support() + (sample.support or self._only(sample.ids))
        self.ids += sample.ids
        self.logp += sample.logp
        self.mask += [True] * len(sample.ids)
        self.version += sample.version or [0] * len(sample.ids)
        self.turns.append(Turn(begin, len(self.ids), 0.0, sample.text))
        self.text = sample.text

    def add_feedback(self, reward: float, heard: str) -> None:
        """What the last turn earned, and what was answered."""
        last = self.turns[-1]
        self.turns[-1] = Turn(last.begin, last.end, last.reward + reward, last.reply, last.observation + heard)

    def between(self, reply: Message, new: Sequence[Message]) -> list[int]:
        """The ids that would come behind the last reply."""
        ended = bool(self.ids) and self.ids[-1] in self.layout.ends
        return self.layout.between(self.first, reply, new, ended=ended)[0]

    def add_observation(self, ids: Sequence[int]) -> None:
        """Puts ids of the environment's behind what was said: they do not count."""
        if self.support is not None:
            self.support = self.support + self._only(ids)
        self.ids += ids
        self.logp += [0.0] * len(ids)
        self.mask += [False] * len(ids)
        self.version += [self.version[-1] if self.version else 0] * len(ids)

    def sample(self, index: int, *, terminated: bool, outcome: str) -> Sample:
        """The episode as the loop takes it."""
        last = self.turns[-1].end
        return Sample(
            self.prompt, self.ids[:last], self.logp[:last], "eos" if terminated else "length", self.text, index,
            None if self.support is None else self.support[:last], self.mask[:last], self.version[:last],
            list(self.turns), outcome,
        )  # fmt: skip

    def partial_sample(self) -> Sample | None:
        """What was said in this conversation; None where nothing was."""
        return self.sample(0, terminated=True, outcome="") if self.turns else None

    def _support(self) -> list[Tensor]:
        return self._only(self.ids) if self.support is None else self.support

    def _only(self, ids: Sequence[int]) -> list[Tensor]:
        return [torch.tensor([i]) for i in ids]


def in_segments(talks: Sequence[Conversation], index: int, *, terminated: bool, outcome: str) -> Sample:
    """One episode whose history was shown anew now and then, as one sample: what was said, one behind the other, and
    of each part the prompt that it was said behind. The sample's own prompt is the first."""
    parts = [part for talk in talks if (part := talk.partial_sample()) is not None]
    whole = Sample(parts[0].prompt, [], [], "eos" if terminated else "length", parts[-1].text, index)
    whole.mask, whole.version, whole.turns, whole.segments, whole.outcome = [], [], [], [], outcome
    if any(part.support is not None for part in parts):
        whole.support = []
    for part in parts:
        at = len(whole.ids)
        whole.segments.append(Segment(part.prompt.ids, at, at + len(part.ids)))
        whole.turns += [Turn(t.begin + at, t.end + at, t.reward, t.reply, t.observation) for t in part.turns or []]
        whole.ids += part.ids
        whole.logp += part.logp
        whole.mask += part.mask or []
        whole.version += part.version or []
        if whole.support is not None:
            whole.support += part.support or []
    return whole
