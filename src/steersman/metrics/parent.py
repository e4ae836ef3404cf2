"""PARENT: a text judged by its table as well as by its references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from steersman.metrics.core import CUTS, MetricInput, Scorer
from steersman.ops.text import ngrams
from steersman.types import SteersmanError

_SMALL, _ORDER = 1e-5, 4
_NULL, _REFERENCES = "<null>", 3
"""What ToTTo's program writes for an empty text and for a reference that lacks, and the references that it reads."""


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

    `program: table_text_eval` is the program of that paper: lam 0.5; its tokens are `space`, ours are `words` if
    not said. `program: totto` is ToTTo's (arXiv 2004.14373, google-research/language totto_eval.sh), which
    RL4LMs runs too. There w(g) is over the column `precision_table`, the whole table; recall_T is over `table`, the
    cells that the text should tell. lam is 1 - the reference's own recall_T. Tokens are sacrebleu's `13a`. An empty
    text reads "<null>", and a row of fewer than three references has "<null>" as one more. Against that one a text
    counts by the tables alone, so with one true reference a mere list of the cells scores high; `null_reference:
    false` leaves it out. Departures: Moses' detokeniser, which changes no text that is written as usual, does not
    run first; more than three references all count; values lie in [0, 1], not in percent.

    Raises SteersmanError naming the row for a table that is none or has no words.
    """

    part: Literal["f1", "precision", "recall"] = "f1"
    lam: float | None = None
    tokens: Literal["words", "space", "13a"] | None = None
    program: Literal["table_text_eval", "totto"] = "table_text_eval"
    null_reference: bool = True
    name = "parent"

    def __post_init__(self) -> None:
        if not self.null_reference and not self._totto:
            raise ValueError("null_reference: false belongs to program: totto; other programs add no reference")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("references", "table", *(("precision_table",) if self._totto else ()))

    @property
    def libraries(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("sacrebleu",) if self._tokens == "13a" else ()

    @property
    def implementation(self) -> str:
        program = "totto_parent_eval" if self._totto else "table_text_eval"
        lam = "1 - the reference's recall of the table" if self._lam is None else self._lam
        return (
            f"steersman's own, equal to google-research/language {program}; {self.part}, word overlap, "
            f"lambda: {lam}, tokens: {self._tokens}{'' if self.null_reference else ', no null reference'}"
        )

    @property
    def _totto(self) -> bool:
        return self.program == "totto"

    @property
    def _lam(self) -> float | None:
        """The weight of recall_T; None where each reference says its own."""
        return 0.5 if self.lam is None and not self._totto else self.lam

    @property
    def _tokens(self) -> Literal["words", "space", "13a"]:
        return self.tokens or ("13a" if self._totto else "words")

    @cached_property
    def _cut(self) -> Callable[[str], list[str]]:
        if self._tokens != "13a":
            return CUTS[self._tokens]
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

        split = Tokenizer13a()
        return lambda text: split(text.strip().lower()).split()

    def wrong_with(self, need: str, value: Any) -> str:
        if need in ("table", "precision_table"):
            return self._entries(need, value)[1]
        return super().wrong_with(need, value)

    def rows(self, batch: MetricInput) -> Sequence[float]:
        cut, out = self._cut, []
        for row, (text, references) in enumerate(zip(batch.texts, batch.references, strict=True)):
            read: dict[str, list[list[str]]] = {}
            for need, tables in batch.columns.items():
                read[need], wrong = self._entries(need, tables[row])
                if wrong:
                    raise SteersmanError(f"metric 'parent', row {row}: {wrong}")
            if self._totto:
                lacks = self.null_reference and len(references) < _REFERENCES
                references = [*references, *([_NULL] if lacks else [])]
                text = text if text.strip() else _NULL
            entries = read["table"]
            values = {word for entry in read.get("precision_table", entries) for word in entry}
            scored = [_parent(cut(text), cut(reference), entries, values, self._lam) for reference in references]
            best = max(scored, key=lambda parts: parts["f1"])
            out.append(best[self.part])
        return out

    def _entries(self, need: str, table: Any) -> tuple[list[list[str]], str]:
        """The words of each entry of a table, and what is wrong with the table; "" where nothing is."""
        name = need.replace("_", " ")
        if not isinstance(table, (list, tuple)) or not table:
            kind = type(table).__name__ if table else "missing" if table is None else "empty"
            return [], f"the {name} is {kind}; give a list of [attribute, value] or of [head, relation, tail]"
        sizes = {len(entry) if isinstance(entry, (list, tuple)) else 0 for entry in table}
        if not sizes <= {2, 3} or len(sizes) != 1:
            return [], (
                f"every entry of a {name} must be [attribute, value], or every one [head, relation, tail]; entries "
                f"here have {sorted(sizes)} parts"
            )
        cut = [self._cut(str(e[1]) if len(e) == 2 else f"{e[0]} {e[2]}") for e in table]
        found = [words for words in cut if words]
        return found, "" if found else f"the {name}'s values have no words"


def _parent(
    text: Sequence[str],
    reference: Sequence[str],
    entries: Sequence[Sequence[str]],
    values: set[str],
    lam: float | None,
) -> dict[str, float]:
    """`values` are the words by which n-grams are weighed; without `lam` it is 1 - the reference's recall of the
    entries."""
    precisions, recalls = [], []
    for n in range(1, _ORDER + 1):
        ours, theirs = Counter(ngrams(text, n)), Counter(ngrams(reference, n))
        weight = {gram: sum(word in values for word in gram) / n for gram in ours | theirs}
        precisions.append(_precision(ours, theirs, weight))
        recalls.append(_recall(ours, theirs, weight))
    precision = _geometric(precisions, at_zero=0.0)
    from_reference = _geometric(recalls, at_zero=_SMALL)
    from_table = _mentioned(entries, text) or _SMALL
    lam = 1 - _mentioned(entries, reference) if lam is None else lam
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


def _mentioned(entries: Sequence[Sequence[str]], text: Sequence[str]) -> float:
    """Mean share of an entry's words that stand in the text in their order."""
    return sum(_lcs(entry, text) / len(entry) for entry in entries) / len(entries)


def _lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
