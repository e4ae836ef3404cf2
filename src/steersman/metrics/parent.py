"""PARENT: a text judged by its table as well as by its references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steersman.metrics.core import CUTS, Cut, MetricInput, Scorer
from steersman.ops.text import ngrams
from steersman.types import SteersmanError

_SMALL, _ORDER = 1e-5, 4


@dataclass
class PARENT(Scorer):
    """PARENT with word overlap as the entailment model, in [0, 1], for the best reference by F.

        precision_n = sum_g count(g) [Pr(g in R) + (1 - Pr(g in R)) w(g)] / sum_g count(g)
        recall_R,n  = sum_g count_R(g) w(g) min(1, count(g) / count_R(g)) / sum_g count_R(g) w(g)
        recall_T    = mean over the table's entries of LCS(entry, text) / |entry|
        F           = harmonic mean of precision and recall_R^(1 - lam) recall_T^lam

    precision and recall_R are geometric means over n = 1..4; w(g) is the share of the n-gram's words that stand
    in the table. The column `table` has pairs [attribute, value] or triples [head, relation, tail]; values, or
    head and tail, count. Smoothing as in the authors' program: 1e-5 for a zero of order 2 or more and for a
    recall of zero. Source: arXiv 1906.01081, eq. 1 to 8.
    """

    part: Literal["f1", "precision", "recall"] = "f1"
    lam: float = 0.5
    tokens: Cut = "words"
    name = "parent"
    needs = ("references", "table")

    @property
    def implementation(self) -> str:
        return (
            f"steersman's own, equal to google-research/language table_text_eval; {self.part}, word overlap, "
            f"lambda: {self.lam}, tokens: {self.tokens}"
        )

    def rows(self, batch: MetricInput) -> Sequence[float]:
        cut, out = CUTS[self.tokens], []
        for row, (text, references) in enumerate(zip(batch.texts, batch.references, strict=True)):
            entries = [cut(entry) for entry in self._entries(row, batch.columns["table"][row])]
            entries = [entry for entry in entries if entry]
            if not entries:
                raise SteersmanError(f"metric 'parent', row {row}: the table's values have no words")
            scored = [_parent(cut(text), cut(reference), entries, self.lam) for reference in references]
            best = max(scored, key=lambda parts: parts["f1"])
            out.append(best[self.part])
        return out

    def _entries(self, row: int, table: Any) -> list[str]:
        """The text of each entry that a sentence should mention."""
        if not isinstance(table, (list, tuple)) or not table:
            raise SteersmanError(
                f"metric 'parent', row {row}: the table is {type(table).__name__ if table else 'empty'}; give a "
                f"list of [attribute, value] or of [head, relation, tail]"
            )
        sizes = {len(entry) if isinstance(entry, (list, tuple)) else 0 for entry in table}
        if not sizes <= {2, 3} or len(sizes) != 1:
            raise SteersmanError(
                f"metric 'parent', row {row}: every entry of a table must be [attribute, value], or every one "
                f"[head, relation, tail]; entries here have {sorted(sizes)} parts"
            )
        return [str(e[1]) if len(e) == 2 else f"{e[0]} {e[2]}" for e in table]


def _parent(
    text: Sequence[str], reference: Sequence[str], entries: Sequence[Sequence[str]], lam: float
) -> dict[str, float]:
    values = {word for entry in entries for word in entry}
    precisions, recalls = [], []
    for n in range(1, _ORDER + 1):
        ours, theirs = Counter(ngrams(text, n)), Counter(ngrams(reference, n))
        weight = {gram: sum(word in values for word in gram) / n for gram in ours | theirs}
        precisions.append(_precision(ours, theirs, weight))
        recalls.append(_recall(ours, theirs, weight))
    precision = _geometric(precisions, at_zero=0.0)
    from_reference = _geometric(recalls, at_zero=_SMALL)
    from_table = sum(_lcs(entry, text) / len(entry) for entry in entries) / len(entries) or _SMALL
    recall = math.exp((1 - lam) * math.log(from_reference) + lam * math.log(from_table))
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall + 1e-8),  # the authors' guard against 0 / 0
    }


def _precision(ours: Counter, theirs: Counter, weight: dict[Any, float]) -> float:
    if not ours:
        return 0.0
    total = 0.0
    for gram, count in ours.items():
        known = min(1.0, theirs[gram] / count)
        total += count * (known + (1 - known) * weight[gram])
    return total / sum(ours.values())


def _recall(ours: Counter, theirs: Counter, weight: dict[Any, float]) -> float:
    whole = sum(count * weight[gram] for gram, count in theirs.items())
    if whole == 0:
        return 1.0
    return sum(count * weight[gram] * min(1.0, ours[gram] / count) for gram, count in theirs.items()) / whole


def _geometric(shares: Sequence[float], at_zero: float) -> float:
    """Geometric mean; zeros of order 2 and more are smoothed, a zero of order 1 gives `at_zero`."""
    if shares[0] == 0:
        return at_zero
    smoothed = [shares[0], *(s or _SMALL for s in shares[1:])]
    return math.exp(sum(map(math.log, smoothed)) / len(smoothed))


def _lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
