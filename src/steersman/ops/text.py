"""Statistics of plain text: words, sentences, n-grams; what metrics, the health watch and summaries count.

A word is a run of letters or digits, lower-cased, with inner apostrophes kept ("didn't" is one word); a character
of a script whose words no spaces tell apart is a word by itself, and so is a syllable of Korean, whose words carry
their endings. Vowel signs and accents belong to their letter.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

_BY_CHARACTER = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
    "\u3005\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"  # Han and kana
    "\uac00-\ud7a3"  # Hangul
)
_MARK = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c) in ("Mn", "Mc"))
_CHARACTER = rf"(?=[^\W_])[{_BY_CHARACTER}][{_MARK}]*"  # with its vowel signs and tone marks
_LETTER = rf"[^\W_{_BY_CHARACTER}]"
_LETTERS = rf"{_LETTER}+(?:[{_MARK}]+{_LETTER}*)*"
_WORD = re.compile(rf"{_LETTERS}(?:'{_LETTERS})*|{_CHARACTER}")
_PIECE = re.compile(rf"[^\W{_BY_CHARACTER}]+(?:[{_MARK}]+[^\W{_BY_CHARACTER}]*)*|{_CHARACTER}|[^\w\s{_MARK}]")
# The same of ASCII text alone, several times as fast as the classes of all scripts.
_ASCII_WORD = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*")
_ASCII_PIECE = re.compile(r"\w+|[^\w\s]")
_WHOLE = re.compile(r"[.!?…][\"'”’»)\]]*(?=\s|$)|[。！？।؟][”’」』）]*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+|\n+")

T = TypeVar("T", bound=Hashable)

LARGEST_LOSS = 50.0
"""Nats above which a perplexity grows no more: a diverged model's would be infinite, which JSON can not hold."""


def perplexity(loss: float) -> float:
    """exp of a mean negative log-likelihood per token (nats), which is taken as at most `LARGEST_LOSS`."""
    return math.exp(min(loss, LARGEST_LOSS))


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; "" where none ends. A point within a number or an address
    ends none, nor does that behind the number of an item."""
    for mark in reversed([*_WHOLE.finditer(text)]):
        before = text[: mark.start()].rpartition("\n")[2].strip()
        if before and not before.isdecimal():
            return text[: mark.end()]
    return ""


def words(text: str) -> list[str]:
    """The words of `text`, lower-cased, in order."""
    plain = text.lower().replace("’", "'")
    return (_ASCII_WORD if plain.isascii() else _WORD).findall(plain)


def pieces(text: str) -> list[str]:
    """Words and signs of a text, lower case; a run of letters too long for a word is cut in fours.

    "friendfriendfriend..." is one word to a tokeniser, yet repeats itself; cut in fours it does so visibly.
    """
    out: list[str] = []
    lower = text.lower()
    for piece in (_ASCII_PIECE if lower.isascii() else _PIECE).findall(lower):
        out += [piece] if len(piece) <= 24 else [piece[i : i + 4] for i in range(0, len(piece), 4)]
    return out


def by_character(text: str) -> bool:
    """Whether most letters of `text` belong to a script of which every character counts as a word."""
    letters = [c for c in text if c.isalpha()]
    return 2 * len(re.findall(f"[{_BY_CHARACTER}]", text)) > len(letters)


def uncut(text: str, tokens: Sequence[str]) -> bool:
    """Whether `tokens` leave most runs of characters that count as words in one piece."""
    plain = "".join(" " if unicodedata.category(c)[0] in "PSZ" else c for c in text)
    runs = [run for run in plain.split() if len(re.findall(_CHARACTER, run)) > 1]
    whole = sum(any(run in token for token in tokens) for run in runs)
    return 2 * whole > len(runs)


def sentences(text: str) -> list[str]:
    """`text` cut after `.`, `!`, `?` (with closing quotes) and at line ends; empty pieces are left out."""
    return [piece for piece in _SENTENCE_END.split(text) if piece and not piece.isspace()]


def ngrams(tokens: Sequence[T], n: int) -> list[tuple[T, ...]]:
    """All runs of `n` neighbours, in order; empty when there are fewer than `n` tokens."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct_share(grams: Sequence[T], *, none: float = 0.0) -> float:
    """Different ones among `grams`, as a share in [0, 1]; `none` where there are no grams."""
    return len(set(grams)) / len(grams) if grams else none


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams / all n-grams over a corpus, in [0, 1]; 0 where there is no n-gram at all.

    It falls as a corpus grows, so compare corpora of the same size. Source: arXiv 1510.03055 (distinct-1, -2),
    with n-grams and not tokens as the denominator.
    """
    return distinct_share([gram for text in texts for gram in ngrams(words(text), n)])


def repetition(text: str, n: int = 3) -> float:
    """Share of the n-grams of `text` that have come before in it, in [0, 1); 0 where there is no n-gram."""
    return 1 - distinct_share(ngrams(words(text), n), none=1.0)


def repeated_share(tokens: Sequence[str], span: int = 4) -> float:
    """Share of tokens that stood among the `span` tokens right before them."""
    if len(tokens) < 2:
        return 0.0
    return sum(w in tokens[max(0, i - span) : i] for i, w in enumerate(tokens)) / len(tokens)


def text_stats(texts: Sequence[str]) -> dict[str, float]:
    """Means over the responses of one iteration, by which the health watch sees text collapse.

    `text/distinct2` and `text/repeated` (per response, over its pieces, of responses with at least 8 of them,
    where there are some), `text/unique` (share of different responses), `text/empty` (share of empty ones). Across
    the same responses: `text/distinct2_all`, distinct-2 over the first 24 pieces of all of them together (a fixed
    length, since distinct-2 falls as a text grows), and `text/phrase`, the share that holds the commonest run of 5
    pieces.
    """
    if not texts:
        return {}
    stripped = [t.strip() for t in texts]
    long = [w for w in map(pieces, stripped) if len(w) >= 8]
    stats = {
        "text/unique": distinct_share(stripped),
        "text/empty": sum(not t for t in stripped) / len(stripped),
    }
    if long:
        stats["text/distinct2"] = sum(distinct_share(ngrams(w, 2)) for w in long) / len(long)
        stats["text/repeated"] = sum(map(repeated_share, long)) / len(long)
        stats["text/distinct2_all"] = distinct_share([gram for w in long for gram in ngrams(w[:24], 2)])
        holders = Counter(gram for w in long for gram in set(ngrams(w, 5)))
        stats["text/phrase"] = max(holders.values()) / len(long)
    return stats
