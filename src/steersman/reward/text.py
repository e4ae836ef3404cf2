"""Statistics of plain text: words, sentences, n-grams; what the health watch and the summaries count.

A word is a run of letters or digits, lower-cased, with inner apostrophes kept ("didn't" is one word).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+|\n+")


def words(text: str) -> list[str]:
    """The words of `text`, lower-cased, in order."""
    return _WORD.findall(text.lower().replace("’", "'"))


def sentences(text: str) -> list[str]:
    """`text` cut after `.`, `!`, `?` (with closing quotes) and at line ends; empty pieces are left out."""
    return [piece for piece in _SENTENCE_END.split(text) if piece and not piece.isspace()]


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` neighbours, in order; empty when there are fewer than `n` tokens."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams / all n-grams over a corpus, in [0, 1]; 0 where there is no n-gram at all.

    It falls as a corpus grows, so compare corpora of the same size. Source: arXiv 1510.03055 (distinct-1, -2),
    with n-grams and not tokens as the denominator.
    """
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_n_each(texts: Sequence[str], n: int = 2) -> list[float]:
    """`distinct_n` of every text by itself: 1 when no n-gram comes twice, 0 for a text without n-grams."""
    return [distinct_n([text], n) for text in texts]


def repetition(text: str, n: int = 3) -> float:
    """Share of the n-grams of `text` that have come before in it, in [0, 1); 0 where there is no n-gram."""
    grams = ngrams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
