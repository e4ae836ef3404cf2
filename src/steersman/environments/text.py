"""What others wrote, cut and cleaned before it reaches the model, a log or a terminal."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from steersman.guards.terminal import printable
from steersman.guards.untrusted import without_half_pairs


def clean_text(text: str, limit: int) -> str:
    r"""The text as a conversation may hold it: at most `limit` characters, control characters written out as `\x1b`,
    half surrogate pairs as U+FFFD."""
    cut = len(text) - limit
    if cut > 0:
        text = text[:limit]
    text = printable(without_half_pairs(text))
    return f"{text}... ({cut} characters left out)" if cut > 0 else text


def reward_of(value: Any, where: str) -> float:
    """A reward as a float. Raises ValueError for None, NaN, infinity and what is no number."""
    if not isinstance(value, Real):
        raise ValueError(f"{where} gave the reward {clean_text(repr(value), 80)}; it must be a finite number")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits, more than Python writes out
        number = math.inf
    if not abs(number) <= 1e16:
        raise ValueError(f"{where} gave the reward {number:g}; it must be a finite number within 1e16")
    return number
