"""How repetitive responses are: the numbers by which the health watch sees text collapse."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A word, a character of a script that is written without spaces, or a sign.
_TOKEN = re.compile(r"[぀-ヿ㐀-鿿가-힣]|[^\W぀-ヿ㐀-鿿가-힣]+|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Words and signs of a text, lower case; a run of letters too long for a word is cut in fours.

    "friendfriendfriend..." is one word to a tokeniser, yet repeats itself; cut in fours it does so visibly.
    """
    out: list[str] = []
    for token in _TOKEN.findall(text.lower()):
        out += [token] if len(token) <= 24 else [token[i : i + 4] for i in range(0, len(token), 4)]
    return out


def distinct_n(words: Sequence[str], n: int = 2) -> float:
    """Share of different n-grams among all n-grams of one text: 1 never repeats, near 0 says one thing only.

    A text with fewer than n + 1 words can not repeat itself and counts as 1.
    Source: Li et al. 2016, arXiv 1510.03055, sec. 5.1 (there over a corpus; here per response).
    """
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if len(grams) > 1 else 1.0


def repeated_share(words: Sequence[str], span: int = 4) -> float:
    """Share of words that stood among the `span` words right before them."""
    if len(words) < 2:
        return 0.0
    return sum(w in words[max(0, i - span) : i] for i, w in enumerate(words)) / len(words)


def text_stats(texts: Sequence[str]) -> dict[str, float]:
    """Means over the responses of one iteration.

    `text/distinct2` and `text/repeated` (of responses with at least 8 words, where there are some),
    `text/unique` (share of different responses), `text/empty` (share of empty ones).
    """
    if not texts:
        return {}
    stripped = [t.strip() for t in texts]
    words = [w for w in map(tokens, stripped) if len(w) >= 8]
    stats = {
        "text/unique": len(set(stripped)) / len(stripped),
        "text/empty": sum(not t for t in stripped) / len(stripped),
    }
    if words:
        stats["text/distinct2"] = sum(map(distinct_n, words)) / len(words)
        stats["text/repeated"] = sum(map(repeated_share, words)) / len(words)
    return stats
