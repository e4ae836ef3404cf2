"""Rewards that are rules, by name in `BUILTINS`: plain functions of texts and columns, like a user's own.

Those that are metrics too are computed there (`metrics/`). Keyword parameters without a default are columns of the
data (rename them with `columns`); those with one are settings (`args`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Number

from steersman.guards.asked_process import AskedProcess
from steersman.guards.terminal import say
from steersman.metrics.answers import concept_coverage, math_equal, normalise_spaces
from steersman.metrics.sentiment import compound
from steersman.ops import text
from steersman.reward import regex_process
from steersman.reward.gold import gold
from steersman.types import SteersmanError


def vader_sentiment(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of the completion, in [-1, 1]. Easily hacked: it loves "friend friend"."""
    return [compound(completion) for completion in completions]


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


def diversity(prompts: Sequence[str], completions: Sequence[str], *, n: int = 2) -> list[float]:
    """1 less the share of a completion's distinct n-grams that stand in another completion scored with it, a mean
    over the others; 1 where there is no other, 0 where it has no n-gram.

    With a positive weight beside a reward it pays for answers unlike one another: a policy that says the same to
    every prompt gets 0. It depends on what is scored together: the batch of an iteration, or about 256 of a
    judge's answers, all to one prompt among them.
    """
    grams = [set(text.ngrams(text.words(c), n)) for c in completions]
    counts, others = Counter(gram for found in grams for gram in found), len(completions) - 1
    if others < 1:
        return [1.0 for _ in completions]
    return [1 - sum(counts[g] - 1 for g in found) / (others * len(found)) if found else 0.0 for found in grams]


def exact_match(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[object], ignore_case: bool = True
) -> list[float]:
    """1 where the completion is the answer, but for outer and repeated white space (and case), else 0."""

    def same(given: str, wanted: str) -> bool:
        if ignore_case:
            return normalise_spaces(given) == normalise_spaces(wanted)
        return given.split() == wanted.split()

    return [float(same(c, a)) for c, a in zip(completions, _written("exact_match", answer), strict=True)]


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
    """1 where the pattern (Python's `re`) is found anywhere in the completion, else 0.

    A completion on which the search takes more than `regex_process.SECONDS` of processor time is worth 0. The first
    such completion of a process is told on standard error.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise SteersmanError(f"reward regex: pattern {pattern!r} is not a regular expression: {error}") from None
    found = [_regex_process().ask({"pattern": pattern, "text": completion}) for completion in completions]
    if any(told is None or told["found"] is None for told in found):
        _tell_late(pattern)
    return [float(told is not None and told["found"] is True) for told in found]


@cache
def _regex_process() -> AskedProcess:
    return AskedProcess(regex_process.__file__, regex_process.LIMIT)


@cache
def _tell_late(pattern: str) -> None:
    say(
        f"reward regex: looking for {pattern!r} in a completion took more than {regex_process.SECONDS:g} s of "
        "processor time; such a completion is worth 0. A repetition within a repetition, as in (\\d+\\s?)+, can take "
        "time that doubles with each character: make the inner one possessive (\\d++) or write the pattern without it"
    )


def math_answer(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[object]) -> list[float]:
    """1 where the completion's final answer equals the row's, else 0.

    The final answer is what stands after the last "####" (as in GSM8K, in data and completions alike);
    without it math-verify looks for one, and where it finds none the last number counts.
    """
    return [float(math_equal(c, a)) for c, a in zip(completions, _written("math_answer", answer), strict=True)]


def _written(rule: str, answer: Sequence[object]) -> list[str]:
    """The right answers as text. Raises SteersmanError where one is neither a text nor a number."""
    for row, one in enumerate(answer):
        if not isinstance(one, str | Number):
            fields = f" with the fields {', '.join(map(str, one))}" if isinstance(one, dict) else ""
            kind = "missing" if one is None else f"of type {type(one).__name__}{fields}"
            raise SteersmanError(
                f"reward {rule}, sample {row}: its answer is {kind}; it must be a text or a number, in a column of "
                f"its own, which `columns: {{answer: NAME}}` names"
            )
    return [str(one) for one in answer]


def word_coverage(
    prompts: Sequence[str], completions: Sequence[str], *, concepts: Sequence[str | Sequence[str]]
) -> list[float]:
    """Share of the row's concepts, in [0, 1], that stand in the completion, compared by Porter stem."""
    pairs = enumerate(zip(completions, concepts, strict=True))
    return [concept_coverage(c, w, f"'word_coverage', row {row}") for row, (c, w) in pairs]


BUILTINS: dict[str, Callable[..., list[float]]] = {
    "vader_sentiment": vader_sentiment,
    "happy_story": gold,
    "length": length,
    "distinct_n": distinct_n,
    "repetition": repetition,
    "diversity": diversity,
    "exact_match": exact_match,
    "contains": contains,
    "regex": regex,
    "math_answer": math_answer,
    "word_coverage": word_coverage,
}
