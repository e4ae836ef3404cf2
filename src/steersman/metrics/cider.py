"""CIDEr-D, with document frequencies that stay the same from batch to batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from steersman.jsonl import parse_jsonl
from steersman.metrics.core import CUTS, Corpus, Cut, MetricInput, Scorer
from steersman.ops.text import ngrams
from steersman.types import SteersmanError

_SIGMA, _ORDER = 6.0, 4
Grams = Counter[tuple[str, ...]]


@dataclass
class CIDEr(Scorer):
    """CIDEr-D, 0 to 10: TF-IDF weighted n-gram agreement with all references, lengths held together.

        10 / (4 m) sum_n sum_j exp(-(l(c) - l(s_j))^2 / 72) min(g_n(c), g_n(s_j)) . g_n(s_j) / (|g_n(c)| |g_n(s_j)|)

    An n-gram's weight falls with the number of rows whose references hold it, so scores depend on the set. The
    rows being judged are that set in an evaluation. A reward needs one that does not change with the batch:
    `corpus_file` is a JSONL file whose `column` holds each row's reference or references.
    As its authors' program, l counts bigrams. Source: arXiv 1411.5726, sec. 4 and 5.
    """

    corpus_file: str | None = None
    column: str = "references"
    tokens: Cut = "words"
    name = "cider"
    needs = ("references",)

    @property
    def per_sample(self) -> bool:  # type: ignore[override]
        return self.corpus_file is not None

    @property
    def implementation(self) -> str:
        where = self.corpus_file or "the references judged"
        return f"steersman's own CIDEr-D, equal to pycocoevalcap 1.2; idf of {where}, tokens: {self.tokens}"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        cut = CUTS[self.tokens]
        cooked = [[_cook(cut(r)) for r in references] for references in batch.references]
        idf = self._idf if self.corpus_file is not None else Idf(cooked, self.name)
        return [
            _cider(_cook(cut(text)), references, idf) for text, references in zip(batch.texts, cooked, strict=True)
        ]

    def over(self, batch: MetricInput) -> Corpus:
        if len(batch.texts) < 2 and self.corpus_file is None:
            raise SteersmanError(
                "metric 'cider': over one row every n-gram has weight 0; give more rows, or the setting corpus_file"
            )
        return super().over(batch)

    @cached_property
    def _idf(self) -> Idf:
        assert self.corpus_file is not None
        cut = CUTS[self.tokens]
        rows = _references_in(Path(self.corpus_file), self.column)
        return Idf(([_cook(cut(r)) for r in references] for references in rows), self.name)


class Idf:
    """log(rows / rows with the n-gram); an n-gram that no row has counts as one row."""

    def __init__(self, rows: Iterable[Sequence[Grams]], name: str):
        self.frequency: Counter[tuple[str, ...]] = Counter()
        count = 0
        for references in rows:
            count += 1
            self.frequency.update({gram for reference in references for gram in reference})
        self.log_rows = math.log(count) if count else 0.0

    def __call__(self, gram: tuple[str, ...]) -> float:
        return self.log_rows - math.log(max(1, self.frequency[gram]))


def _cook(tokens: Sequence[str]) -> Grams:
    return Counter(gram for n in range(1, _ORDER + 1) for gram in ngrams(tokens, n))


def _vectors(grams: Grams, idf: Idf) -> list[dict[tuple[str, ...], float]]:
    out: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDER)]
    for gram, count in grams.items():
        out[len(gram) - 1][gram] = count * idf(gram)
    return out


def _norm(vector: dict[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(w * w for w in vector.values()))


def _bigrams(grams: Grams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _cider(text: Grams, references: Sequence[Grams], idf: Idf) -> float:
    ours, total = _vectors(text, idf), 0.0
    for reference in references:
        theirs = _vectors(reference, idf)
        near = math.exp(-((_bigrams(text) - _bigrams(reference)) ** 2) / (2 * _SIGMA**2))
        for a, b in zip(ours, theirs, strict=True):
            dot = sum(min(w, b[gram]) * b[gram] for gram, w in a.items() if gram in b)
            norms = _norm(a) * _norm(b)
            total += near * (dot / norms if norms else dot)
    return 10 * total / (_ORDER * len(references))


def _references_in(path: Path, column: str) -> list[list[str]]:
    if not path.is_file():
        raise SteersmanError(f"metric 'cider': corpus_file: there is no file {path}")
    out = []
    for place, row in parse_jsonl(path):
        if not isinstance(row, dict) or column not in row:
            raise SteersmanError(f"metric 'cider': {place}: give a JSON object with the column '{column}'")
        value = row[column]
        out.append([value] if isinstance(value, str) else [str(v) for v in value])
    if len(out) < 2:
        raise SteersmanError(f"metric 'cider': {path} has {len(out)} rows; document frequencies need 2 or more")
    return out
