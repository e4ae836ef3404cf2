"""Answers against what is right: exact match, token F1, mathematics, concepts to be named."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

from steersman.guards.asked_process import AskedProcess
from steersman.metrics import math_process
from steersman.metrics.core import MetricInput, Scorer, check_script
from steersman.metrics.stems import stem
from steersman.ops.text import by_character, words
from steersman.types import SteersmanError

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
LONGEST = 20_000
"""Characters at the end of a completion in which a final answer is looked for."""
# A power of ten written with four digits or more (of any script: Python reads them all), or more digits than Python
# reads.
_TOO_LARGE = re.compile(r"[\d.][eE][+-]?[\d_]{4,}|\d{4000}")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?")
# The commas and blanks that a number may have: "- 1,200.50", "1 200", "3 / 4".
_ONE_NUMBER = re.compile(r"[+-]? ?(?:\d{1,3}([, ])\d{3}(?:\1\d{3})*|\d+)(?:\.\d+)?(?: ?/ ?\d+)?")
_MIXED = re.compile(r"(?<![^\s$({=-])(\d{1,15}) (\d{1,15})/(\d{1,15})(?![\d/]|\.\d)")
_ITEM = r"[+-]?\d+(?:\.\d+)?(?:/\d+)?"
_LIST = re.compile(rf"{_ITEM}(?:(?:,\s*|\s+){_ITEM})+")
# Signs as they are typed: hyphens and minuses of Unicode; an en dash directly before a number, if it is no range;
# any of them apart from its number, where nothing else can be meant; and before a currency.
_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2212\ufe63\uff0d", "-"))
_EN_DASH = re.compile(r"(?<!\d)\u2013(?=[\d.$€£\\])")
_APART = re.compile(r"([=≈({] ?|\bis |^(?=[-\u2013] ?[$€£]?[\d.,]+\.?$))[-\u2013] ?(?=[$€£]?[\d.])")
_BEFORE_CURRENCY = re.compile(r"(?<![\w)\]}$])(?<!\d )-([$€£])(?=[\d.])")


def squad_normal(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, white space joined. Source: arXiv 1606.05250."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


@dataclass
class ExactMatch(Scorer):
    """1 where the text is one of the references after normalising, else 0. An empty reference means no answer.

    `normal`: squad drops case, punctuation and articles; space only joins white space and drops case.
    """

    normal: Literal["squad", "space"] = "squad"
    name = "exact_match"
    needs = ("references",)
    empty_reference = True

    @property
    def implementation(self) -> str:
        return f"steersman's own, equal to SQuAD's evaluate-v1.1; normal: {self.normal}"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        normal = squad_normal if self.normal == "squad" else normalise_spaces
        return [
            float(normal(text) in {normal(r) for r in references})
            for text, references in zip(batch.texts, batch.references, strict=True)
        ]


def normalise_spaces(text: str) -> str:
    """Case folded, white space joined."""
    return " ".join(text.split()).casefold()


@dataclass
class TokenF1(Scorer):
    """F1 of the bag of words against the best reference, in [0, 1], words as SQuAD normalises them.

    Two empty answers agree (1), as in SQuAD 2.0. SQuAD cuts at white space, so a reference in Chinese, Thai, Korean
    and the like is refused; `tokens: words` reads it character by character (`ops.text.words`). Source: arXiv
    1606.05250.
    """

    tokens: Literal["squad", "words"] = "squad"
    name = "token_f1"
    needs = ("references",)
    empty_reference = True

    @property
    def implementation(self) -> str:
        if self.tokens == "words":
            return "steersman's own over ops.text.words, articles left out"
        return "steersman's own, equal to SQuAD's evaluate-v2.0"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        if self.tokens == "squad":
            check_script(self.name, batch.references, "set `tokens: words`")
        cut = words if self.tokens == "words" else str.split
        return [
            max(_f1(cut(squad_normal(text)), cut(squad_normal(r))) for r in references)
            for text, references in zip(batch.texts, batch.references, strict=True)
        ]


def _f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


@dataclass
class MathAnswer(Scorer):
    """1 where the text's final answer equals the reference's, else 0.

    The final answer is what stands after the last "####" (as in GSM8K, in texts and references alike); without
    it math-verify looks for one, and where it finds none the last number counts. "1,200" and "1 200" are one number,
    "1 1/2" is three halves, and "2, 3" is a list, which math-verify compares as a set. A minus sign or an en dash of
    Unicode is a minus as "-" is.
    """

    name = "math_answer"
    needs = ("references",)
    libraries = ("math_verify",)

    @property
    def implementation(self) -> str:
        return f"math-verify {version('math-verify')}, after GSM8K's mark"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        return [
            float(any(math_equal(text, reference) for reference in references))
            for text, references in zip(batch.texts, batch.references, strict=True)
        ]


def math_equal(completion: str, answer: str) -> bool:
    """Whether the final answer of the completion is the answer's.

    Of a long completion the last `LONGEST` characters are read. What takes math-verify too long, or is a number
    too large to be written out, is no right answer.
    """
    wanted = answer.rpartition("####")[2].strip()
    marked = "####" in completion
    given = completion.rpartition("####")[2].strip().split("\n")[0] if marked else completion
    wanted, given = (_MIXED.sub(_improper, _signed(text)) for text in (wanted, given[-LONGEST:]))
    target = _as_number(wanted)
    if marked and target is not None and (number := _as_number(given)) is not None:
        return number == target
    if _TOO_LARGE.search(given) or _TOO_LARGE.search(wanted):
        return False
    listed = _as_list(given)
    question = {"given": f"${listed}$" if listed else given, "wanted": _as_list(wanted) or wanted}
    verdict = _math_process().ask(question)
    if verdict is None or verdict["has_answer"]:
        return verdict is not None and verdict["equal"]
    numbers = _NUMBER.findall(given)
    return bool(numbers) and target is not None and _as_number(numbers[-1]) == target


@cache
def _math_process() -> AskedProcess:
    return AskedProcess(math_process.__file__, math_process.LIMIT)


def _signed(written: str) -> str:
    """Every minus as "-", directly before its number: " = \u2212 3" as " = -3", "-$5" as "$-5"."""
    plain = _EN_DASH.sub("-", written.translate(_MINUS))
    return _BEFORE_CURRENCY.sub(r"\1-", _APART.sub(r"\1-", plain))


def _as_number(written: str) -> Fraction | None:
    """ "$1,200.50." as 2401/2; None where the text is more than one number, or one of too many digits."""
    bare = written.strip().lstrip("$€£% ").rstrip("$€£%. ")
    if _TOO_LARGE.search(bare) or (("," in bare or " " in bare) and not _ONE_NUMBER.fullmatch(bare)):
        return None
    try:
        return Fraction(bare.replace(",", "").replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _improper(mixed: re.Match[str]) -> str:
    """ "1 1/2" as "3/2": math-verify takes the mixed number for 1."""
    whole, over, under = (int(part) for part in mixed.groups())
    return f"{whole * under + over}/{under}" if over < under else mixed[0]


def _as_list(written: str) -> str | None:
    """ "2 3" as "2, 3", as math-verify reads a list; None where the text is no list of numbers."""
    if _LIST.fullmatch(written) is None or _as_number(written) is not None:
        return None
    return ", ".join(re.split(r",\s*|\s+", written))


@dataclass
class ConceptCoverage(Scorer):
    """Share of the row's concepts, in [0, 1], that stand in the text, compared by Porter's stem.

    The column `concepts` has a list of words or a text of words.
    """

    name = "concept_coverage"
    needs = ("concepts",)
    libraries = ("nltk",)

    @property
    def implementation(self) -> str:
        return f"steersman's own over ops.text.words and nltk {version('nltk')} Porter stems"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        pairs = zip(batch.texts, batch.columns["concepts"], strict=True)
        return [
            concept_coverage(text, concepts, f"'{self.name}', row {row}")
            for row, (text, concepts) in enumerate(pairs)
        ]


def concept_coverage(text: str, concepts: Any, who: str = "'concept_coverage'") -> float:
    """Share of the concepts whose stem is among the text's; raises SteersmanError where there is no concept."""
    listed = concepts.split() if isinstance(concepts, str) else concepts
    if not isinstance(listed, (list, tuple)) or not (wanted := {stem(str(word)) for word in listed}):
        raise SteersmanError(f"metric {who}: the concepts are empty or no list; give at least one word")
    found = {stem(word) for word in words(text)}
    # a word of such a script is several of `words`, so it is looked for in the text
    return sum(word in found or (by_character(word) and word in text.lower()) for word in wanted) / len(wanted)
