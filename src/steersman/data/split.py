"""Held-out rows, chosen so that no prompt is ever on both sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from steersman.data.examples import Content, Demonstration, Example, Query, Rating
from steersman.data.rows import BadRows
from steersman.types import SteersmanError

E = TypeVar("E", bound=Example)
HELD_OUT = "prompt is held out"
"""The reason by which rows are counted whose prompt is among the held-out ones."""


def prompt_key(example: Example) -> str:
    """A stable hash (hex) of the prompt, or of the text where there is no prompt."""
    prompt = example.prompt
    if isinstance(example, Demonstration | Rating) and not prompt:
        prompt = example.completion
    return hash_of(prompt)


def row_key(example: Query) -> str:
    """A stable hash (hex) of the prompt and all other columns: an environment may begin otherwise for each row."""
    columns = json.dumps(example.columns, sort_keys=True, ensure_ascii=False, default=str)
    return hash_of(f"{hash_of(example.prompt)} {columns}")


def hash_of(content: Content) -> str:
    """A stable hash (hex) of a text or conversation."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def key_of(hashed: str) -> int:
    """The first 52 bits of a hash."""
    return int(hashed[:13], 16)


def held_keys(keys: np.ndarray, held_out: float | int) -> np.ndarray:
    """Which rows are held out by the keys of their prompts, as `split` chooses them."""
    if held_out < 1:
        return keys / 16**13 < held_out
    return np.isin(keys, np.sort(keys)[: int(held_out)])


def split(
    examples: Sequence[E], held_out: float | int, key: Callable[[E], str] = prompt_key
) -> tuple[list[E], list[E]]:
    """(train, held out), both in the given order; examples of one key (of one prompt) stay together.

    A prompt is held out by its hash alone, so the split does not depend on the order of the file or on a seed,
    and a row added later moves no other row. `held_out` below 1 is a share of prompts (in expectation); an
    integer is a number of examples, reached with the prompts of smallest hash (more, where the last prompt has
    several examples).

    Raises SteersmanError where one side would be empty.
    """
    if held_out == 0:
        return list(examples), []
    keys = [key(e) for e in examples]
    if held_out < 1:
        chosen = {k for k in keys if key_of(k) / 16**13 < held_out}
    else:
        chosen = set(sorted(keys)[: int(held_out)])
    train = [e for e, k in zip(examples, keys, strict=True) if k not in chosen]
    held = [e for e, k in zip(examples, keys, strict=True) if k in chosen]
    if not train or not held:
        side = "training" if not train else "held-out"
        raise SteersmanError(
            f"data.held_out: {held_out:g} of {len(keys)} examples over {len(set(keys))} prompts leaves no {side} "
            "example; change data.held_out"
        )
    return train, held


def without(
    examples: Sequence[E], held: Sequence[E], key: Callable[[E], str] = prompt_key
) -> tuple[list[E], list[E]]:
    """The examples whose key (prompt) is not among the held-out ones, and those whose key is."""
    held_keys = {key(e) for e in held}
    shared = [key(e) in held_keys for e in examples]
    apart = [e for e, s in zip(examples, shared, strict=True) if not s]
    return apart, [e for e, s in zip(examples, shared, strict=True) if s]


def passed_over(
    examples: Iterable[E], held: frozenset[str], bad: BadRows, key: Callable[[E], str] = prompt_key
) -> Iterator[E]:
    """The examples one by one whose key (prompt) is not among those held out; the others are counted."""
    if not held:
        yield from examples
        return
    for e in examples:
        if key(e) in held:
            bad.note(HELD_OUT, e.row.where())
        else:
            yield e
