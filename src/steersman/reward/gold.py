"""The quickstart's judge: how happy is a piece of a simple English story, for a reader who can't be fooled.

A sentiment lexicon summed over words rewards "friend friend friend ...". This judge counts every sentiment word
family once, bounds what one sentence can give, and multiplies by a gate that is 1 for the way English
stories are written and falls to 0 for repetition, word lists and text that is not English:

    gold(y) = gate(y) * (1 + mood(y)) / 2                      in [0, 1]; 0.5 is a neutral story
    mood(y) = tanh( sum_s tanh( sum_{new w in s} valence(w | s) / 3 ) / 3 )      in (-1, 1)

`valence(w | s)` is VADER's, in context ("not happy" is negative), so a gloomy story still scores above
degenerate text. The bands of the gate are set from 2,200 TinyStories (64-word continuations); tests hold them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer, SentiText

from steersman.ops.text import ngrams, sentences, words


def _set(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


FUNCTION_WORDS = _set("""
    a an the this that these those my your his her its our their some any no every all each both many much
    more most few other another i you he she it we they me him us them who what which something everything
    everyone someone nothing and or but so because if when while then than as until though of to in on at by for
    with from into onto over under up down out off about around after before through near behind between without
    again away back is am are was were be been being do does did has have had can could will would shall should
    may might must not don't didn't doesn't can't couldn't won't wasn't isn't aren't weren't wouldn't it's i'm
    i'll let's that's there here where how why too very just also there's he's she's they're you're we're
    one
""")

# A noun or an adjective comes next, or one of the few function words that may stand between.
_DETERMINERS = _set("a an the my your our their its every")
_AFTER_DETERMINER = _set("one other most very few much more just back while")
# A verb comes next, so never one of these.
_SUBJECTS = _set("i he she we they")
_NEVER_AFTER_SUBJECT = (
    _DETERMINERS
    | _SUBJECTS
    | _set("of in on at by for with from into onto over under him us them me it that this these those not")
)

# A preposition far more often than a feeling.
_NO_FEELING = _set("like")


@dataclass(frozen=True, slots=True)
class GoldScore:
    """What the judge saw: `gold` = `gate` * (1 + `mood`) / 2, and the factors of the gate by name."""

    gold: float
    mood: float
    gate: float
    factors: dict[str, float]


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def _ramp(x: float, zero: float, one: float) -> float:
    """0 at `zero` and beyond, 1 at `one` and beyond, a straight line between; `zero` may be the larger."""
    return min(max((x - zero) / (one - zero), 0.0), 1.0)


def _valences(sentence: str) -> list[tuple[str, float]]:
    """The sentiment words of a sentence with their valence in context (VADER's scale, -4 to 4)."""
    vader, parsed = _vader(), SentiText(sentence)
    found = []
    for i, token in enumerate(parsed.words_and_emoticons):
        word = token.lower()
        is_name = i > 0 and token[0].isupper()  # Mia, Grace, Hope
        if word not in vader.lexicon or not word[0].isalpha() or word in _NO_FEELING or is_name:
            continue
        found.append((word, vader.sentiment_valence(0, parsed, token, i, [])[0]))
    return found


def mood(text: str) -> tuple[float, float]:
    """How happy the text is, in (-1, 1), and the share of its words that carry sentiment.

    Words that share their first four letters (happy, happily) are one family and count at the first place only.
    """
    seen: set[str] = set()
    total, bearing = 0.0, 0
    for sentence in sentences(text):
        fresh = 0.0
        for word, valence in _valences(sentence):
            bearing += 1
            if word[:4] not in seen:
                seen.add(word[:4])
                fresh += valence
        total += math.tanh(fresh / 3)
    return math.tanh(total / 3), bearing / max(len(words(text)), 1)


def broken_order(pairs: Sequence[tuple[str, ...]]) -> float:
    """Share of determiners and subject pronouns that a word follows which can't (the of, she my).

    2 in 1,000 in natural stories, 37 in 100 when their words are shuffled.
    """
    heads = broken = 0
    for head, after in pairs:
        if head in _DETERMINERS:
            heads += 1
            broken += after in FUNCTION_WORDS and after not in _AFTER_DETERMINER
        elif head in _SUBJECTS:
            heads += 1
            broken += after in _NEVER_AFTER_SUBJECT
    return broken / max(heads, 5)


def fluency(text: str, sentiment_share: float) -> dict[str, float]:
    """The factors of the gate, each in [0, 1] and 1 within the band where natural stories lie."""
    tokens = words(text)
    if not tokens:
        return {"words": 0.0}
    n = len(tokens)
    pairs = ngrams(tokens, 2)
    lengths = [len(words(sentence)) for sentence in sentences(text)]
    sane = sum(length for length in lengths if 2 <= length <= 40)
    function = sum(token in FUNCTION_WORDS for token in tokens) / n
    content = Counter(token for token in tokens if token not in FUNCTION_WORDS)
    letters = sum(map(len, tokens)) / max(len("".join(text.split())), 1)
    return {
        "words": _ramp(n, 0, 8),
        "distinct_pairs": _ramp(len(set(pairs)) / max(len(pairs), 1), 0.5, 0.8),
        "most_common_word": _ramp(max(Counter(tokens).values()) / n, 0.35, 0.2) if n >= 8 else 1.0,
        "function_words": _ramp(function, 0.15, 0.33) * _ramp(function, 0.9, 0.75),
        "content_words": _ramp(len(content) / max(sum(content.values()), 1), 0.2, 0.45),
        "word_order": _ramp(broken_order(pairs), 0.3, 0.15),
        "sentence_length": _ramp(sane / n, 0.3, 0.7),
        "sentiment_share": _ramp(sentiment_share, 0.45, 0.25),
        "letters": _ramp(letters, 0.5, 0.8),
    }


@lru_cache(maxsize=65536)
def judge(text: str) -> GoldScore:
    """Score one continuation of a story and say why."""
    feeling, share = mood(text)
    factors = fluency(text, share)
    gate = math.prod(factors.values())
    return GoldScore(gate * (1 + feeling) / 2, feeling, gate, factors)


def gold(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The judge's score of every completion, in [0, 1]; a reward function like any other."""
    return [judge(text).gold for text in completions]
