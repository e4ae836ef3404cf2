"""Lexicon sentiment by the `vaderSentiment` package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version

from steersman.metrics.core import MetricInput, Scorer
from steersman.ops.text import by_character, words
from steersman.types import SteersmanError


@dataclass
class VaderSentiment(Scorer):
    """VADER's compound sentiment of English text, in [-1, 1]; 0 for a text without a word of its lexicon. Texts that
    are all Chinese, Japanese, Korean, Thai or the like, where every score would be 0, are refused.

    Easily hacked: it loves "friend friend". Source: Hutto and Gilbert 2014.
    """

    name = "vader_sentiment"

    @property
    def implementation(self) -> str:
        return f"vaderSentiment {version('vaderSentiment')}, compound"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        written = [text for text in batch.texts if words(text)]
        if written and all(map(by_character, written)):
            raise SteersmanError(
                f"metric '{self.name}', row 0: its lexicon is English, the texts are not: {written[0][:30]!r}; use "
                "the metric classifier, with a model of sentiment in their language as its `path`"
            )
        return [compound(text) for text in batch.texts]


@lru_cache(maxsize=65536)
def compound(text: str) -> float:
    """The package's compound score, remembered."""
    return _analyzer().polarity_scores(text)["compound"]


@cache
def _analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
