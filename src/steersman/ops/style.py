"""Counts of what a reader sees of an answer before its content: length and formatting."""

from __future__ import annotations

import re

from steersman.ops.text import words

FEATURES = ("length", "headers", "lists", "bold")
_HEADER = re.compile(r"^#{1,6} ", re.MULTILINE)
_LIST = re.compile(r"^ {0,12}(?:[-*+]|\d{1,4}[.)]) ", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]{1,400}\*\*|__[^_\n]{1,400}__")


def style_counts(text: str) -> tuple[int, ...]:
    """Words, headers, list items and bold spans, in the order of FEATURES."""
    return len(words(text)), *(len(pattern.findall(text)) for pattern in (_HEADER, _LIST, _BOLD))
