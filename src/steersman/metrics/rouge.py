"""ROUGE by the `rouge-score` package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Literal

from steersman.metrics.core import MetricInput, Scorer, check_script
from steersman.metrics.stems import Stemmer
from steersman.ops.text import words
from steersman.types import SteersmanError


@dataclass
class Rouge(Scorer):
    """ROUGE's F1 of the text against its nearest reference, in [0, 1].

    `rougeLsum` takes every line for a sentence. The package's own tokeniser keeps a-z and 0-9 only, so a
    reference in another script has no tokens, which is refused; `tokens: words` reads letters of every script,
    without stemming.
    Source: Lin 2004; the best of several references by F1, as the package's `score_multi`.
    """

    name: str = "rougeL"
    stem: bool = True
    tokens: Literal["rouge", "words"] = "rouge"
    needs = ("references",)
    libraries = ("rouge_score", "nltk")

    @property
    def implementation(self) -> str:
        stem = self.stem and self.tokens == "rouge"
        return f"rouge-score {version('rouge-score')}, {self.name} F1, tokens: {self.tokens}, stem: {stem}"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        if self.tokens == "rouge":
            check_script(self.name, batch.references, "set `tokens: words`, or use chrf")
        for row, references in enumerate(batch.references):
            if not any(self._tokenizer.tokenize(r) for r in references):
                raise SteersmanError(
                    f"metric '{self.name}', row {row}: no reference has a letter that ROUGE's tokeniser knows "
                    f"(a-z, 0-9): {references[0][:40]!r}; set `tokens: words`, or use chrf"
                )
        return [
            self._scorer.score_multi(references, text)[self.name].fmeasure
            for text, references in zip(batch.texts, batch.references, strict=True)
        ]

    @cached_property
    def _tokenizer(self):
        return _Words() if self.tokens == "words" else _RougeTokens(self.stem)

    @cached_property
    def _scorer(self):
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer([self.name], tokenizer=self._tokenizer)


class _RougeTokens:
    """The package's own tokens; only the stems are remembered, which are most of its time."""

    def __init__(self, stem: bool):
        self.stemmer = Stemmer() if stem else None

    def tokenize(self, text: str) -> list[str]:
        from rouge_score import tokenize

        return tokenize.tokenize(text, self.stemmer)


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return words(text)
