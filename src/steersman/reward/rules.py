"""Rewards that are rules, by name in `BUILTINS`: plain functions of texts and columns, like a user's own.

Keyword parameters without a default are columns of the data (rename them with `columns`); those with one
are settings (`args`).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache, lru_cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from steersman.ops import text
from steersman.reward.gold import gold
from steersman.types import SteersmanError

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


@lru_cache(maxsize=65536)
def _compound(completion: str) -> float:
    return _vader().polarity_scores(completion)["compound"]


def vader_sentiment(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of the completion, in [-1, 1]. Easily hacked: it loves "friend friend"."""
    return [_compound(completion) for completion in completions]


def length(prompts: Sequence[str], completions: Sequence[str], *, target: int | None = None) -> list[float]:
    """Number of words n; with a `target`, -|n - target| / target."""
    counts = [len(text.words(completion)) for completion in completions]
    if target is None:
        return [float(n) for n in counts]
    if target < 1:
        raise SteersmanError(f"reward length: target is {target}; give a number of words, 1 or more")
    return [-abs(n - target) / target for n in counts]


def distinct_n(prompts: Sequence[str], completions: Sequence[str], *, n: int = 2) -> list[float]:
    """Distinct n-grams / n-grams of each completion, in [0, 1]."""
    return [text.distinct_n([completion], n) for completion in completions]


def repetition(prompts: Sequence[str], completions: Sequence[str], *, n: int = 3) -> list[float]:
    """Share of n-grams that came before in the same completion, in [0, 1); give it a negative weight."""
    return [text.repetition(completion, n) for completion in completions]


def exact_match(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[object], ignore_case: bool = True
) -> list[float]:
    """1 where the completion is the answer, but for outer and repeated white space (and case), else 0."""

    def same(given: str, wanted: object) -> bool:
        left, right = " ".join(given.split()), " ".join(str(wanted).split())
        return left.casefold() == right.casefold() if ignore_case else left == right

    return [float(same(c, a)) for c, a in zip(completions, answer, strict=True)]


def contains(
    prompts: Sequence[str], completions: Sequence[str], *, strings: Sequence[str], ignore_case: bool = True
) -> list[float]:
    """Share of `strings` that stand in the completion, in [0, 1].

    `strings` is a setting, the same for every row; `word_coverage` reads a column.
    """
    if isinstance(strings, str) or not strings:
        raise SteersmanError("reward contains: strings must be a list of one string or more")
    fold = str.casefold if ignore_case else str
    return [sum(fold(s) in fold(c) for s in strings) / len(strings) for c in completions]


def regex(prompts: Sequence[str], completions: Sequence[str], *, pattern: str) -> list[float]:
    """1 where the pattern (Python's `re`) is found anywhere in the completion, else 0."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SteersmanError(f"reward regex: pattern {pattern!r} is not a regular expression: {error}") from None
    return [float(compiled.search(completion) is not None) for completion in completions]


def math_answer(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[object]) -> list[float]:
    """1 where the completion's final answer equals the row's, else 0.

    The final answer is what stands after the last "####" (as in GSM8K, in data and completions alike);
    without it math-verify looks for one, and where it finds none the last number counts.
    """
    return [float(_math_equal(c, str(a))) for c, a in zip(completions, answer, strict=True)]


def word_coverage(
    prompts: Sequence[str], completions: Sequence[str], *, concepts: Sequence[str | Sequence[str]]
) -> list[float]:
    """Share of the row's concepts, in [0, 1], that stand in the completion, compared by Porter stem."""
    return [_covered(c, w) for c, w in zip(completions, concepts, strict=True)]


BUILTINS: dict[str, Callable[..., list[float]]] = {
    "vader_sentiment": vader_sentiment,
    "happy_story": gold,
    "length": length,
    "distinct_n": distinct_n,
    "repetition": repetition,
    "exact_match": exact_match,
    "contains": contains,
    "regex": regex,
    "math_answer": math_answer,
    "word_coverage": word_coverage,
}


def _math_equal(completion: str, answer: str) -> bool:
    # The two libraries below each take half a second to import, so only who asks for them pays.
    from math_verify import parse, verify

    wanted = answer.rpartition("####")[2].strip()
    marked = "####" in completion
    given = completion.rpartition("####")[2].strip().split("\n")[0] if marked else completion
    target = _as_number(wanted)
    if marked and target is not None and (number := _as_number(given)) is not None:
        return number == target
    # math-verify's time limits use signals, which only the main thread may set.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    found = parse(given, parsing_timeout=limit)  # pyright: ignore[reportArgumentType]
    if not found:
        numbers = _NUMBER.findall(given)
        return bool(numbers) and target is not None and _as_number(numbers[-1]) == target
    expected = parse(f"${wanted}$", parsing_timeout=limit)  # pyright: ignore[reportArgumentType]
    return bool(expected) and verify(expected, found, timeout_seconds=limit)


def _as_number(written: str) -> Fraction | None:
    """ "$1,200.50." as 2401/2; None where the text is more than one number."""
    bare = written.strip().strip("$€£%. ").replace(",", "").replace(" ", "")
    try:
        return Fraction(bare)
    except (ValueError, ZeroDivisionError):
        return None


def _covered(completion: str, concepts: str | Sequence[str]) -> float:
    wanted = {_stem(word) for word in (concepts.split() if isinstance(concepts, str) else concepts)}
    if not wanted:
        raise SteersmanError("reward word_coverage: a row's concepts are empty; give at least one word")
    return len(wanted & {_stem(word) for word in text.words(completion)}) / len(wanted)


@lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    return _stemmer().stem(word.lower())


@cache
def _stemmer():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
