"""Examples -> token ids within the limits of length; what does not fit is refused, left out or cut, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from steersman.data.config import DataConfig
from steersman.data.examples import Content, Demonstration, Example, Feedback, Preference, Query, Ranking, Rating
from steersman.data.tokenize import Layout
from steersman.types import Prompt, SteersmanError

E = TypeVar("E", bound=Example)
Policy = Literal["error", "drop", "truncate"]


@dataclass(slots=True)
class Encoded:
    """One prompt with one response; `mask[t]` says whether response token t counts in the loss."""

    prompt: list[int]
    response: list[int]
    mask: list[bool]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(slots=True)
class EncodedSet(Generic[E]):
    """`groups[i]` holds the answers of `examples[i]`, all with the same prompt ids: one for a demonstration,
    chosen and rejected for a pair, K for a ranking.

    `dropped` and `cut` count what was too long, `special` the examples whose text spells a special token,
    `open_prompts` the plain-text prompts that end in white space (the boundary then splits a token that the
    model knows whole).
    """

    groups: list[list[Encoded]] = field(default_factory=list)
    examples: list[E] = field(default_factory=list)
    dropped: int = 0
    cut: int = 0
    special: int = 0
    open_prompts: int = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each group's longest answer with its prompt."""
        return [max(map(len, group)) for group in self.groups]

    @property
    def first(self) -> list[Encoded]:
        """The first answer of each group: all there is of demonstrations."""
        return [group[0] for group in self.groups]


def layout(tokenizer: object, config: DataConfig) -> Layout:
    """The layout that a data section asks for."""
    return Layout(
        tokenizer,
        append_eos=config.append_eos,
        allow_special_tokens=config.allow_special_tokens,
        wrap_in_chat=config.wrap_in_chat,
        assistant_turns=config.assistant_turns,
    )


def encode(examples: Sequence[E], laid: Layout, config: DataConfig, context: int | None = None) -> EncodedSet[E]:
    """Token ids and masks of examples, at most `max_length` tokens each (the model's `context` if that is less).

    Raises SteersmanError at the first example that is too long where `on_too_long` is error, at a conversation
    that the template can not lay out, and where nothing is left.
    """
    out: EncodedSet[E] = EncodedSet()
    max_length = smallest(config.max_length, context)
    for example in examples:
        group = _group(example, laid)
        fitting, was_cut = _fit(example, group, laid, config, max_length)
        if fitting is None:
            out.dropped += 1
            continue
        out.groups.append(fitting)
        out.examples.append(example)
        out.cut += was_cut
        contents = [example.prompt, *answers(example)]
        out.special += any(laid.codec.has_special(c) for c in contents)
        out.open_prompts += isinstance(example.prompt, str) and example.prompt[-1:].isspace()
    if not out.groups:
        raise SteersmanError(f"no example fits: all {out.dropped} are longer than {max_length} tokens")
    return out


def encode_prompts(
    queries: Sequence[Query], laid: Layout, config: DataConfig, context: int | None = None, new_tokens: int = 0
) -> tuple[list[Prompt], int, int]:
    """(prompts, how many were dropped, how many were cut) for the rollout engine.

    A prompt may have `max_prompt_tokens`, and must leave room for `new_tokens` in the model's `context`.
    `Prompt.index` is the place among `queries`, so that leaving one out moves no other.

    Raises SteersmanError at the first prompt that is too long where `on_too_long` is error.
    """
    limit = smallest(config.max_prompt_tokens, None if context is None else context - new_tokens)
    if limit is not None and limit < 1:
        raise SteersmanError(f"{new_tokens} new tokens leave no room for a prompt in a context of {context} tokens")
    out, dropped, cut = [], 0, 0
    for index, query in enumerate(queries):
        try:
            ids, text = laid.prompt(query.prompt)
        except SteersmanError as error:
            raise SteersmanError(f"{query.row.where()}: {error}") from error
        if limit is not None and len(ids) > limit:
            if config.on_too_long == "error":
                raise query.row.fault("too long", f"the prompt has {len(ids)} tokens, at most {limit} fit. {_MEND}")
            if config.on_too_long == "drop":
                dropped += 1
                continue
            cut += 1
            ids = _cut_left(ids, limit, laid)
            text = laid.codec.decode(ids, after=False)
        out.append(Prompt(ids, text, query.columns, index))
    if not out:
        raise SteersmanError(f"no prompt fits: all {dropped} are longer than {limit} tokens")
    return out, dropped, cut


def answers(example: Example) -> list[Content]:
    """The answers of an example, in order."""
    match example:
        case Preference():
            return [example.chosen, example.rejected]
        case Ranking():
            return example.completions
        case Demonstration() | Feedback() | Rating():
            return [example.completion]
        case Query():
            return []


_MEND = (
    "Raise data.max_length or data.max_prompt_tokens, or set data.on_too_long to drop or truncate "
    "(both are counted and reported)"
)


def smallest(*limits: int | None) -> int | None:
    """The least of the limits that are given."""
    return min((limit for limit in limits if limit is not None), default=None)


def _group(example: Example, laid: Layout) -> list[Encoded]:
    try:
        group = [Encoded(*laid.answer(example.prompt, answer)) for answer in answers(example)]
    except SteersmanError as error:
        raise SteersmanError(f"{example.row.where()}: {error}") from error
    if any(e.prompt != group[0].prompt for e in group):
        raise SteersmanError(
            f"{example.row.where()}: the chat template lays the prompt out differently for different answers; "
            "such a template can not be used for pairs or rankings"
        )
    return group


def _fit(
    example: Example, group: list[Encoded], laid: Layout, config: DataConfig, max_length: int | None
) -> tuple[list[Encoded] | None, bool]:
    prompt, longest = group[0].prompt, max(len(e.response) for e in group)
    # text alone has only its first token as prompt, which a limit on prompts does not mean
    max_prompt = config.max_prompt_tokens if example.prompt else None
    fits = (max_prompt is None or len(prompt) <= max_prompt) and (
        max_length is None or len(prompt) + longest <= max_length
    )
    if fits:
        return group, False
    if config.on_too_long == "error":
        limits = f"max_prompt_tokens {max_prompt}, max_length {max_length}"
        raise example.row.fault(
            "too long", f"{len(prompt)} prompt tokens and {longest} response tokens exceed {limits}. {_MEND}"
        )
    if config.on_too_long == "drop":
        return None, False
    room = smallest(max_prompt, None if max_length is None else max_length - longest)
    prompt = _cut_left(prompt, room or 0, laid)
    end = None if max_length is None else max_length - len(prompt)
    cut = [Encoded(prompt, e.response[:end], e.mask[:end]) for e in group]
    # what is left must still teach something
    return (cut, True) if all(any(e.mask) for e in cut) else (None, False)


def _cut_left(ids: list[int], limit: int, laid: Layout) -> list[int]:
    """The last ids, behind what the tokenizer puts in front of every text; one id of its own at least."""
    head = laid.codec.prefix if ids[: len(laid.codec.prefix)] == laid.codec.prefix else []
    tail = max(limit - len(head), min(1, len(ids) - len(head)))
    return head + ids[len(ids) - tail :] if len(ids) - len(head) > tail else ids
