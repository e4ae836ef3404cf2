"""Examples -> token ids within the limits of length; what does not fit is refused, left out or cut, and counted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from steersman.data.config import DataConfig
from steersman.data.encoder_decoder import PairLayout
from steersman.data.examples import Example, Query, answers, compares_two, user
from steersman.data.rows import BadRows
from steersman.data.tokenize import Layout, Room, smallest
from steersman.types import Prompt, SteersmanError

E = TypeVar("E", bound=Example)
E_co = TypeVar("E_co", bound=Example, covariant=True)
Policy = Literal["error", "drop", "truncate"]


@dataclass(slots=True)
class Encoded:
    """One prompt with one response; `mask[t]` says whether response token t counts in the loss."""

    prompt: list[int]
    response: list[int]
    mask: list[bool]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class TrainingSet(Protocol[E_co]):
    """Examples with their token ids by place, wherever they are: in memory, on disk, or the window of a stream."""

    @property
    def groups(self) -> Sequence[list[Encoded]]:
        """The answers of each example, all with the same prompt ids."""
        ...

    @property
    def examples(self) -> Sequence[E_co]: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example's longest answer with its prompt."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether it is small enough to be gone through before the first step."""
        ...

    def values(self, name: str) -> np.ndarray:
        """A field of all examples, such as `label` or `weight`, as numbers; NaN where there is none."""
        ...


COUNTED = ("dropped", "cut", "equal", "special", "open_prompts")
"""What an `EncodedSet` counts while it is made."""


@dataclass(slots=True)
class EncodedSet(Generic[E]):
    """`groups[i]` holds the answers of `examples[i]`, all with the same prompt ids: one for a demonstration,
    chosen and rejected for a pair, K for a ranking.

    `dropped` and `cut` count what was too long, `equal` the pairs whose answers are the same tokens, `special` the
    examples whose text spells a special token, `open_prompts` the plain-text prompts that end in white space (the
    boundary then splits a token that the model knows whole).
    """

    groups: list[list[Encoded]] = field(default_factory=list)
    examples: list[E] = field(default_factory=list)
    dropped: int = 0
    cut: int = 0
    equal: int = 0
    special: int = 0
    open_prompts: int = 0
    _lengths: np.ndarray = field(default_factory=lambda: np.empty(0, int), init=False, repr=False, compare=False)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each group's longest answer with its prompt."""
        if len(self._lengths) != len(self.groups):
            self._lengths = np.array([max(map(len, group)) for group in self.groups])
        return self._lengths

    @property
    def in_memory(self) -> bool:
        return True

    def values(self, name: str) -> np.ndarray:
        """A field of all examples as numbers; NaN where there is none."""
        return np.array([getattr(e, name) for e in self.examples], dtype=float)

    @property
    def parts(self) -> list[int]:
        """Of which path each group is, where sets are mixed."""
        return [e.row.part for e in self.examples]

    def add(self, other: EncodedSet[E]) -> None:
        """Puts another set's examples behind these."""
        self.groups += other.groups
        self.examples += other.examples
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def first(self) -> list[Encoded]:
        """The first answer of each group: all there is of demonstrations."""
        return [group[0] for group in self.groups]


def wraps(tokenizer: Any, config: DataConfig) -> bool:
    """Whether plain-text prompts go through the model's chat template, in training as in sampling: as the section
    says, or where the tokenizer has a template of its own."""
    return bool(tokenizer.chat_template) if config.wrap_in_chat is None else config.wrap_in_chat


def wrapped(queries: Sequence[Query], laid: Layout) -> bool:
    """Whether any of the prompts is plain text that becomes a user's turn in the chat template."""
    return laid.wrap_in_chat and any(isinstance(query.prompt, str) for query in queries)


def layout(reader: Any, config: DataConfig) -> Layout:
    """The layout that a data section asks for, for a policy or scalar model; a bare tokenizer is a causal model's."""
    tokenizer, start = getattr(reader, "tokenizer", reader), getattr(reader, "decoder_start", ())
    kind = functools.partial(PairLayout, start=len(start)) if start else Layout
    return kind(
        tokenizer,
        append_eos=config.append_eos,
        allow_special_tokens=config.allow_special_tokens,
        wrap_in_chat=wraps(tokenizer, config),
        assistant_turns=config.assistant_turns,
    )


def encode(examples: Sequence[E], laid: Layout, config: DataConfig, context: int | None = None) -> EncodedSet[E]:
    """Token ids and masks of examples, at most `max_length` tokens each (the model's `context` if that is less; an
    encoder-decoder has one for the prompt and one for the answer).

    Raises SteersmanError at the first example that is too long where `on_too_long` is error, at a pair whose answers
    are the same tokens where `on_bad_row` is stop, at a conversation that the template can not lay out, where nothing
    is left, and for texts that the tokenizer can not read.
    """
    out: EncodedSet[E] = EncodedSet()
    room = laid.room(config.max_prompt_tokens, config.max_length, context)
    for example in examples:
        put(out, example, laid, config, room)
    require_known(out, laid)
    if not out.groups:
        raise nothing_left(out, room)
    return out


def nothing_left(out: EncodedSet[Any], room: Room) -> SteersmanError:
    """The error of a set of which no example is left."""
    too_long = f"{out.dropped} are longer than {_limits(room)}"
    if out.equal:
        return SteersmanError(f"no pair is left: in {out.equal} the answers are the same tokens, {too_long}")
    return SteersmanError(f"no example fits: all {too_long}")


def put(out: EncodedSet[E], example: E, laid: Layout, config: DataConfig, room: Room) -> bool:
    """Puts an example into the set, or counts it as too long or as a pair of equal answers; whether it is there.
    Raises SteersmanError as `encode` does."""
    group = _group(example, laid)
    fitting, was_cut = _fit(example, group, laid, config, room)
    if fitting is None:
        out.dropped += 1
        return False
    if compares_two(example) and fitting[0].response == fitting[1].response:
        cut = "both answers are the same tokens" + (", cut to data.max_length" if was_cut else "")
        BadRows(config.on_bad_row).add(example.row.fault("equal answers", cut))
        out.equal += 1
        return False
    out.groups.append(fitting)
    out.examples.append(example)
    out.cut += was_cut
    contents = [example.prompt, *answers(example)]
    out.special += any(laid.codec.has_special(c) for c in contents)
    joined = laid.joined and not laid.wrap_in_chat
    out.open_prompts += joined and isinstance(example.prompt, str) and example.prompt[-1:].isspace()
    return True


def require_known(out: EncodedSet[Any], laid: Layout) -> None:
    """Raises SteersmanError where more than half of a set's tokens are the tokenizer's unknown one."""
    _require_known(laid, [(e, [*g[0].prompt, *(i for a in g for i in a.response)]) for e, g in
                          zip(out.examples, out.groups, strict=True)])  # fmt: skip


def encode_prompts(
    queries: Sequence[Query], laid: Layout, config: DataConfig, context: int | None = None, new_tokens: int = 0
) -> tuple[list[Prompt], int, int]:
    """(prompts, how many were dropped, how many were cut) for the rollout engine.

    A prompt may have `max_prompt_tokens`, and must leave room for `new_tokens` in the model's `context`.
    `Prompt.index` is the place among `queries`, so that leaving one out moves no other.

    Raises SteersmanError at the first prompt that is too long where `on_too_long` is error, and for texts that the
    tokenizer can not read.
    """
    limit = laid.prompt_room(config.max_prompt_tokens, context, new_tokens)
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
            ids = laid.cut(ids, limit, config.cut)
            text = laid.codec.decode(ids, after=False)
        out.append(
            Prompt(
                ids, text, query.columns, index, user(query.prompt) if isinstance(query.prompt, str) else query.prompt
            )
        )
    _require_known(laid, [(queries[prompt.index], prompt.ids) for prompt in out])
    if not out:
        raise SteersmanError(f"no prompt fits: all {dropped} are longer than {limit} tokens")
    return out, dropped, cut


_MEND = (
    "Raise data.max_length or data.max_prompt_tokens, or set data.on_too_long to drop or truncate "
    "(both are counted and reported)"
)


def _require_known(laid: Layout, rows: Sequence[tuple[Example | Query, list[int]]]) -> None:
    """Raises SteersmanError where more than half of all tokens are the tokenizer's unknown one."""
    unknown = laid.codec.unknown_id
    if unknown is None:
        return
    counts = [ids.count(unknown) for _, ids in rows]
    if 2 * sum(counts) > sum(len(ids) for _, ids in rows):
        share = sum(counts) / sum(len(ids) for _, ids in rows)
        first = next(row for (row, _), count in zip(rows, counts, strict=True) if count)
        raise first.row.fault(
            "unknown to the tokenizer",
            f"{share:.0%} of all tokens of the data are '{laid.codec.tokenizer.unk_token}': the texts are in a "
            "language or script that the model's tokenizer does not have; use another model, or other data",
        )


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
    example: Example, group: list[Encoded], laid: Layout, config: DataConfig, room: Room
) -> tuple[list[Encoded] | None, bool]:
    prompt, longest = group[0].prompt, max(len(e.response) for e in group)
    # text alone has only its first token as prompt, which a limit on prompts does not mean
    most = (room.prompt if example.prompt else None, room.response, room.both)
    sizes = (len(prompt), longest, len(prompt) + longest)
    if all(limit is None or size <= limit for size, limit in zip(sizes, most, strict=True)):
        return group, False
    if config.on_too_long == "error":
        raise example.row.fault(
            "too long", f"{len(prompt)} prompt tokens and {longest} response tokens exceed {_limits(room)}. {_MEND}"
        )
    if config.on_too_long == "drop":
        return None, False
    longest = smallest(longest, room.response) or 0
    limit = smallest(most[0], None if room.both is None else room.both - longest, len(prompt))
    prompt = laid.cut(prompt, limit or 0, config.cut)
    end = smallest(room.response, None if room.both is None else room.both - len(prompt))
    cut = [Encoded(prompt, e.response[:end], e.mask[:end]) for e in group]
    # what is left must still teach something
    return (cut, True) if all(any(e.mask) for e in cut) else (None, False)


def _limits(room: Room) -> str:
    """The limits in words, by the recipe's names."""
    named = {"prompt": room.prompt, "response (the decoder's context)": room.response, "both together": room.both}
    return ", ".join(f"{limit} of {name}" for name, limit in named.items() if limit is not None)
