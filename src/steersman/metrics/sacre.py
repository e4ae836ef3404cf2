"""BLEU, chrF, chrF++ and TER by the `sacrebleu` package; all in percent, as it gives them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

import numpy as np

from steersman.metrics.core import Better, Corpus, MetricInput, Scorer, bootstrap, check_script
from steersman.metrics.edits import edits


class _Sacre(Scorer):
    """A metric of sacrebleu: sentence scores for single texts, pooled counts for the whole set."""

    needs = ("references",)
    libraries = ("sacrebleu",)

    @cached_property
    @abstractmethod
    def _scorer(self) -> Any: ...

    @cached_property
    def _pooled(self) -> Any:
        """The scorer of a whole set, where it is set up in another way than that of single texts."""
        return self._scorer

    @property
    def implementation(self) -> str:
        return f"sacrebleu {version('sacrebleu')}, {self._settings}"

    @property
    @abstractmethod
    def _settings(self) -> str: ...

    def rows(self, batch: MetricInput) -> Sequence[float]:
        self._check(batch)
        pairs = zip(batch.texts, batch.references, strict=True)
        return [self._scorer.sentence_score(text, references).score for text, references in pairs]

    def over(self, batch: MetricInput) -> Corpus:
        self._check(batch)
        pooled = self._pooled
        counts = np.array([
            pooled._extract_corpus_statistics([text], [[r] for r in references])[0]
            for text, references in zip(batch.texts, batch.references, strict=True)
        ], dtype=float)  # fmt: skip
        return bootstrap(
            counts, lambda sums: np.array([pooled._compute_score_from_stats(list(s)).score for s in sums]), self.name
        )

    def _check(self, batch: MetricInput) -> None:
        """Refuses what the tokeniser can't read."""

    def _cut(self, text: str) -> list[str]:
        return self._scorer._preprocess_segment(text).split()


@dataclass
class SacreBLEU(_Sacre):
    """BLEU, 0 to 100. Single texts use the effective order: n-gram orders longer than the text don't count.

    `smooth` is sacrebleu's: exp halves with each order without a match. Source: Post 2018, arXiv 1804.08771.
    """

    tokenize: str = "13a"
    lowercase: bool = False
    smooth: Literal["exp", "floor", "add-k", "none"] = "exp"
    max_order: int = 4
    name = "sacrebleu"

    @property
    def _settings(self) -> str:
        return f"tok: {self.tokenize}, lowercase: {self.lowercase}, smooth: {self.smooth}, order: {self.max_order}"

    def _made(self, effective: bool) -> Any:
        from sacrebleu.metrics.bleu import BLEU

        return BLEU(
            lowercase=self.lowercase,
            force=True,
            tokenize=self.tokenize,
            smooth_method=self.smooth,
            max_ngram_order=self.max_order,
            effective_order=effective,
        )

    @cached_property
    def _scorer(self) -> Any:
        return self._made(True)

    @cached_property
    def _pooled(self) -> Any:
        return self._made(False)

    def _check(self, batch: MetricInput) -> None:
        if self.tokenize in ("13a", "intl", "none", "zh"):
            mend = "set `tokenize: char` (`zh` for Chinese), or use chrf"
            check_script(self.name, batch.references, mend, self._cut)


@dataclass
class ChrF(_Sacre):
    """F score of character n-grams, 0 to 100; with `word_order` 2 it is chrF++. Source: Popović 2015, 2017."""

    name: str = "chrf"
    word_order: int = 0
    char_order: int = 6
    beta: int = 2
    lowercase: bool = False

    @property
    def _settings(self) -> str:
        return f"chars: {self.char_order}, words: {self.word_order}, beta: {self.beta}, lowercase: {self.lowercase}"

    @cached_property
    def _scorer(self) -> Any:
        from sacrebleu.metrics.chrf import CHRF

        return CHRF(char_order=self.char_order, word_order=self.word_order, beta=self.beta, lowercase=self.lowercase)

    def _check(self, batch: MetricInput) -> None:
        if self.word_order:
            check_script(self.name, batch.references, "use chrf, which reads characters alone")


@dataclass
class TER(_Sacre):
    """Edits per reference word, in percent, 0 or more; lower is better. Source: Snover et al. 2006.

    Departure from sacrebleu: the edits are counted by `metrics.edits`, to the same number.
    """

    normalized: bool = False
    punctuation: bool = True
    case_sensitive: bool = False
    asian: bool = False
    name = "ter"
    libraries = ("sacrebleu", "rapidfuzz")
    better: Better = field(default="lower", init=False, repr=False)

    @property
    def _settings(self) -> str:
        return f"normalized: {self.normalized}, punctuation: {self.punctuation}, case: {self.case_sensitive}"

    @cached_property
    def _scorer(self) -> Any:
        from sacrebleu.metrics.ter import TER as _TER

        class Counted(_TER):
            def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict[str, Any]) -> list[float]:
                listed = ref_kwargs["ref_words"]
                fewest = min(edits(hypothesis.split(), reference) for reference in listed)
                return [fewest, sum(map(len, listed)) / len(listed)]

        return Counted(
            normalized=self.normalized,
            no_punct=not self.punctuation,
            asian_support=self.asian,
            case_sensitive=self.case_sensitive,
        )

    def _check(self, batch: MetricInput) -> None:
        mend = "set `asian: true` and `normalized: true` (Chinese and Japanese), or use chrf"
        check_script(self.name, batch.references, mend, self._cut)
