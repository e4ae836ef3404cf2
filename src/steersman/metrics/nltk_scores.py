"""Tokenised BLEU and METEOR by nltk, which needs none of its data files for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any, Literal

import numpy as np

from steersman.metrics.core import CUTS, Corpus, Cut, MetricInput, Scorer, bootstrap
from steersman.metrics.stems import Stemmer

Smooth = Literal["none", "epsilon", "add-1", "halving"]
_METHODS: dict[Smooth, str] = {"none": "method0", "epsilon": "method1", "add-1": "method2", "halving": "method3"}


@dataclass
class BLEU(Scorer):
    """BLEU over words, in [0, 1]; unlike `sacrebleu` it drops punctuation and case by its tokeniser.

    `smooth` names nltk's methods 0 to 3: none; 0.1 for a count of 0; one more for each count above unigrams;
    halving with each order without a match. Source: Papineni et al. 2002; Chen and Cherry 2014.
    """

    order: int = 4
    smooth: Smooth = "halving"
    tokens: Cut = "words"
    name = "bleu"
    needs = ("references",)
    libraries = ("nltk",)

    @property
    def implementation(self) -> str:
        return f"nltk {version('nltk')} bleu_score, order: {self.order}, smooth: {self.smooth}, tokens: {self.tokens}"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        return [self._value(counts) for counts in self._counts(batch)]

    def over(self, batch: MetricInput) -> Corpus:
        return bootstrap(
            self._counts(batch), lambda sums: np.array([self._value(counts) for counts in sums]), self.name
        )

    def _counts(self, batch: MetricInput) -> np.ndarray:
        """Per text: matches of each order, n-grams of each order, its length, the nearest reference's length."""
        from nltk.translate.bleu_score import closest_ref_length, modified_precision

        cut, rows = CUTS[self.tokens], []
        for text, references in zip(batch.texts, batch.references, strict=True):
            hypothesis, listed = cut(text), [cut(r) for r in references]
            shares = [modified_precision(listed, hypothesis, n) for n in range(1, self.order + 1)]
            length = len(hypothesis)
            rows.append(
                [s.numerator for s in shares]
                + [s.denominator for s in shares]
                + [length, closest_ref_length(listed, length)]
            )
        return np.array(rows, dtype=float)

    def _value(self, counts: np.ndarray) -> float:
        from nltk.translate.bleu_score import Fraction, SmoothingFunction, brevity_penalty

        matches, totals = counts[: self.order], counts[self.order : 2 * self.order]
        length, nearest = counts[2 * self.order :]
        if matches[0] == 0:
            return 0.0
        shares = [Fraction(int(m), int(t), _normalize=False) for m, t in zip(matches, totals, strict=True)]
        smooth = getattr(SmoothingFunction(), _METHODS[self.smooth])
        smoothed = smooth(shares, references=None, hypothesis=None, hyp_len=length)
        if any(p == 0 for p in smoothed):
            return 0.0
        return brevity_penalty(nearest, length) * float(np.exp(np.mean([np.log(float(p)) for p in smoothed])))


class _NoSynonyms:
    def synsets(self, word: str) -> list[Any]:
        return []


@dataclass
class METEOR(Scorer):
    """METEOR's score with exact and stem matches, in [0, 1], against its best reference.

    Departure from the paper: no synonyms, because WordNet's data are a download of their own; scores are lower
    than METEOR's where a text says the same in other words. `meteor1.5` has them.
    Source: Lavie and Agarwal 2007, with its weights 0.9, 3, 0.5 as nltk's.
    """

    tokens: Cut = "words"
    name = "meteor"
    needs = ("references",)
    libraries = ("nltk",)

    @property
    def implementation(self) -> str:
        return f"nltk {version('nltk')} meteor_score, exact and stem matches only, tokens: {self.tokens}"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        cut = CUTS[self.tokens]
        return [
            self._score([cut(r) for r in references], cut(text))
            for text, references in zip(batch.texts, batch.references, strict=True)
        ]

    @cached_property
    def _score(self) -> Any:
        from nltk.translate.meteor_score import meteor_score

        stand_ins: dict[str, Any] = {"stemmer": Stemmer(), "wordnet": _NoSynonyms()}
        return partial(meteor_score, **stand_ins)
