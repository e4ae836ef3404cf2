"""How varied texts are: distinct and unique n-grams, entropy, type-token ratio, repetition, length."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from steersman.metrics.core import Better, Corpus, MetricInput, Scorer, jackknife
from steersman.ops import text as counts
from steersman.ops.text import ngrams, words
from steersman.types import SteersmanError

_OWN = "steersman's own over ops.text.words"


class _Pooled(Scorer):
    """A count over the n-grams of all texts together: of a set as a whole, or of one text by itself."""

    n: int

    @property
    def implementation(self) -> str:
        return f"{_OWN}, n: {self.n}"

    @abstractmethod
    def of(self, grams: Sequence[tuple[str, ...]]) -> float:
        """The value of a list of n-grams."""

    def rows(self, batch: MetricInput) -> Sequence[float]:
        return [self.of(ngrams(words(text), self.n)) for text in batch.texts]

    def over(self, batch: MetricInput) -> Corpus:
        grams = {text: ngrams(words(text), self.n) for text in batch.texts}

        def pooled(part: MetricInput) -> float:
            return self.of([gram for text in part.texts for gram in grams[text]])

        return jackknife(batch, pooled, self.name)


@dataclass
class Distinct(_Pooled):
    """Distinct n-grams / n-grams, in [0, 1]; 0 where there is none. A set's value falls as the set grows.

    Source: arXiv 1510.03055.
    """

    n: int = 2
    name = "distinct"

    def of(self, grams: Sequence[tuple[str, ...]]) -> float:
        return counts.distinct_share(grams)


@dataclass
class Unique(_Pooled):
    """Number of n-grams that come exactly once; a set's value grows with the set. Source: arXiv 2102.01672."""

    n: int = 2
    name = "unique"

    def of(self, grams: Sequence[tuple[str, ...]]) -> float:
        return float(sum(count == 1 for count in Counter(grams).values()))


@dataclass
class Entropy(_Pooled):
    """Shannon entropy of the n-grams' frequencies, in bits; 0 where there is none. Source: arXiv 2102.01672."""

    n: int = 2
    name = "entropy"

    def of(self, grams: Sequence[tuple[str, ...]]) -> float:
        total = len(grams)
        return sum(c / total * math.log2(total / c) for c in Counter(grams).values())


@dataclass
class MSTTR(Scorer):
    """Mean segmental type-token ratio: mean share of distinct words in segments of `segment` words, in [0, 1].

    What is left after the last whole segment does not count; a set's words are joined first. Raises
    SteersmanError for a text, or a set, with less than one segment. Source: Johnson 1944; arXiv 2102.01672.
    """

    segment: int = 100
    name = "msttr"

    @property
    def implementation(self) -> str:
        return f"{_OWN}, segment: {self.segment}"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        return [self._of(words(text), f", row {row}: the text has") for row, text in enumerate(batch.texts)]

    def over(self, batch: MetricInput) -> Corpus:
        tokens = {text: words(text) for text in batch.texts}
        self._of([word for text in batch.texts for word in tokens[text]], ": the texts have")

        def joined(part: MetricInput) -> float:
            together = [word for text in part.texts for word in tokens[text]]
            return self._of(together, "") if len(together) >= self.segment else math.nan

        return jackknife(batch, joined, self.name)

    def _of(self, tokens: list[str], who: str) -> float:
        starts = range(0, len(tokens) - self.segment + 1, self.segment)
        if not starts:
            raise SteersmanError(
                f"metric 'msttr'{who} {len(tokens)} words, less than one segment of {self.segment}; "
                f"set a smaller `segment`"
            )
        return sum(len(set(tokens[i : i + self.segment])) for i in starts) / (self.segment * len(starts))


@dataclass
class Repetition(Scorer):
    """Share of a text's n-grams that came before in it, in [0, 1); a set's value is the mean."""

    n: int = 3
    name = "repetition"
    better: Better = field(default="lower", init=False, repr=False)

    @property
    def implementation(self) -> str:
        return f"{_OWN}, n: {self.n}"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        return [counts.repetition(text, self.n) for text in batch.texts]


@dataclass
class Length(Scorer):
    """Words of a text; a set's value is the mean."""

    name = "length"
    better: Better = field(default="neither", init=False, repr=False)

    @property
    def implementation(self) -> str:
        return _OWN

    def rows(self, batch: MetricInput) -> Sequence[float]:
        return [float(len(words(text))) for text in batch.texts]
