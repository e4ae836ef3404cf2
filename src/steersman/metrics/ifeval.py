"""Instruction-following checks as in IFEval: what a program can see of whether a text did as it was told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from steersman.metrics.core import MetricInput, Scorer
from steersman.types import SteersmanError

Settings = Mapping[str, Any]
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATIONS = {
    "mr",
    "mrs",
    "ms",
    "dr",
    "prof",
    "st",
    "jr",
    "sr",
    "vs",
    "etc",
    "e.g",
    "i.e",
    "inc",
    "ltd",
    "co",
    "u.s",
}


@dataclass
class IFEval(Scorer):
    """Share of the row's instructions that the text follows, in [0, 1]; with `whole` 1 only if it follows all.

    The columns `instruction_id_list` and `kwargs` are those of IFEval's data. `loose` also tries the text without
    its first line, its last line, both, and its asterisks, and takes the best. An empty text follows none.

    Departures from the authors' program: sentences end as nltk's Punkt finds them with a short list of
    abbreviations, because Punkt's trained English data are a download of their own; a letter to be counted that is
    a sign ("#", "!") is counted, where theirs puts a random letter in its place; keywords, forbidden words, markers
    and section names are text, where theirs are patterns. Languages need the package langdetect.
    Source: arXiv 2311.07911, sec. 2 and table 1.
    """

    whole: bool = False
    loose: bool = False
    name = "ifeval"
    needs = ("instruction_id_list", "kwargs")
    libraries = ("nltk",)

    @property
    def implementation(self) -> str:
        how = ("loose" if self.loose else "strict") + (", all or nothing" if self.whole else ", share")
        return f"steersman's own, equal to IFEval's checks but for sentence ends (nltk {version('nltk')}); {how}"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        columns = zip(batch.columns["instruction_id_list"], batch.columns["kwargs"], strict=True)
        out = []
        for row, (text, (names, settings)) in enumerate(zip(batch.texts, columns, strict=True)):
            if not (isinstance(names, (list, tuple)) and isinstance(settings, (list, tuple))):
                raise SteersmanError(
                    f"metric 'ifeval', row {row}: instruction_id_list is {type(names).__name__} and kwargs "
                    f"{type(settings).__name__}; give a list of each"
                )
            if not names or len(names) != len(settings):
                raise SteersmanError(
                    f"metric 'ifeval', row {row}: {len(names)} instructions with {len(settings)} kwargs; give one "
                    f"each, and one instruction or more"
                )
            kept = [self._follows(row, text, *pair) for pair in zip(names, settings, strict=True)]
            out.append(float(all(kept)) if self.whole else sum(kept) / len(kept))
        return out

    def _follows(self, row: int, text: str, name: str, settings: Settings | None) -> bool:
        place = f"metric 'ifeval', row {row}"
        check = CHECKS.get(name) if isinstance(name, str) else None
        if check is None:
            raise SteersmanError(f"{place}: there is no instruction '{name}'")
        if settings is not None and not isinstance(settings, Mapping):
            raise SteersmanError(f"{place}: the kwargs of {name} are {type(settings).__name__}; give a mapping")
        given = {k: v for k, v in (settings or {}).items() if v is not None}
        try:
            return any(bool(t.strip()) and check(t, given) for t in (_looser(text) if self.loose else [text]))
        except KeyError as error:
            raise SteersmanError(f"{place}: the instruction {name} has no {error} in its kwargs") from None
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise SteersmanError(
                f"{place}: the instruction {name} can not be read with the kwargs {str(given)[:120]}: {error}"
            ) from error


def _looser(text: str) -> list[str]:
    lines = text.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [variant for t in [text, *cut] for variant in (t, t.replace("*", ""))]


def _compared(count: int, relation: str, limit: int) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"the relation is '{relation}'; it is 'less than' or 'at least'")
    return count < limit if relation == "less than" else count >= limit


def _language(text: str) -> str | None:
    """ISO code of the language, the same in every run; None where a text has no letters to tell it by."""
    if find_spec("langdetect") is None:
        raise SteersmanError(
            "metric 'ifeval': an instruction asks for a language, which needs the package langdetect "
            "(pip install 'steersman[langdetect]')"
        )
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0
    try:
        return detect(text)
    except LangDetectException:
        return None


def _in_language(text: str, language: str) -> bool:
    return _language(text) in (language, None)  # without a letter the authors give the benefit of the doubt


@cache
def _punkt() -> Any:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    known = PunktParameters()
    known.abbrev_types = set(_ABBREVIATIONS)
    return PunktSentenceTokenizer(known)


def _capital_words(text: str, k: Settings) -> bool:
    from nltk.tokenize import NLTKWordTokenizer

    count = sum(word.isupper() for word in NLTKWordTokenizer().tokenize(text))
    return _compared(count, k["capital_relation"], k["capital_frequency"])


def _paragraphs(text: str, k: Settings) -> bool:
    """Paragraphs are set apart by ***; only the first and the last may be empty, and then don't count."""
    pieces = [p.strip() for p in re.split(r"\s?\*\*\*\s?", text)]
    if not all(pieces[1:-1]):
        return False
    return sum(bool(p) for p in pieces) == k["num_paragraphs"]


def _nth_first_word(text: str, k: Settings) -> bool:
    """The nth of the pieces between empty lines starts with the word, and there are as many pieces as asked."""
    pieces = text.split("\n\n")
    count, nth = sum(bool(p.strip()) for p in pieces), k["nth_paragraph"]
    if nth > count or not pieces[nth - 1].strip():
        return False
    first = pieces[nth - 1].split()[0].lstrip("'").lstrip('"')
    return count == k["num_paragraphs"] and re.split(r"[.,?!'\"]", first)[0].lower() == k["first_word"].lower()


def _postscript(text: str, k: Settings) -> bool:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker: str = k["postscript_marker"]
    return re.search(known.get(marker) or re.escape(marker.lower()), text.lower()) is not None


def _bullets(text: str, k: Settings) -> bool:
    # White space in front of a line is eaten whether a bullet follows or not, so that no empty line is read twice.
    stars = re.finditer(r"^\s*+(\*[^\*].*$|)", text, re.MULTILINE)
    dashes = re.finditer(r"^\s*+(-.*$|)", text, re.MULTILINE)
    return sum(bool(m[1]) for m in (*stars, *dashes)) == k["num_bullets"]


def _placeholders(text: str) -> int:
    """Number of [...] on one line, as `\\[.*?\\]` finds them, in linear time."""
    count = 0
    for line in text.split("\n"):
        end = 0
        while (start := line.find("[", end)) >= 0 and (end := line.find("]", start) + 1):
            count += 1
    return count


def _titles(text: str) -> list[str]:
    """What stands between the first << and the last >> of each line, if anything does."""
    found = []
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and start + 2 < end:
            found.append(line[start : end + 2])
    return found


def _highlights(text: str, k: Settings) -> bool:
    single = [h for h in re.findall(r"\*[^\n\*]*\*", text) if h.strip("*").strip()]
    double = [h for h in re.findall(r"\*\*([^\n\*]*)\*\*", text) if h.strip()]
    return len(single) + len(double) >= k["num_highlights"]


def _json(text: str, k: Settings) -> bool:
    bare = re.sub(r"^```(json|Json|JSON)?", "", text.strip()).removesuffix("```").strip()
    try:
        json.loads(bare, parse_int=len)  # how many digits a number has is no matter
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str, k: Settings) -> bool:
    pieces = [p.strip() for p in text.split("******")]
    if not all(pieces[1:-1]):
        return False
    answers = [p for p in pieces if p]
    return len(answers) == 2 and answers[0] != answers[1]


def _letters(text: str, k: Settings) -> bool:
    return _compared(text.lower().count(k["letter"].lower()), k["let_relation"], k["let_frequency"])


def _found(words: str, text: str, *, whole: bool = False) -> int:
    """How often the words stand in the text, whatever the case; `whole`: not inside a longer word.

    They are data, so they are text and no pattern: one that is meant to take for ever can not.
    """
    pattern = re.escape(words)
    return len(re.findall(rf"(?<!\w){pattern}(?!\w)" if whole else pattern, text, re.IGNORECASE))


CHECKS: dict[str, Callable[[str, Settings], bool]] = {
    "keywords:existence": lambda t, k: all(_found(w, t) for w in k["keywords"]),
    "keywords:frequency": lambda t, k: _compared(_found(k["keyword"].strip(), t), k["relation"], k["frequency"]),
    "keywords:forbidden_words": lambda t, k: not any(_found(w, t, whole=True) for w in k["forbidden_words"]),
    "keywords:letter_frequency": _letters,
    "language:response_language": lambda t, k: _in_language(t, k["language"]),
    "length_constraints:number_sentences": lambda t, k: _compared(
        len(_punkt().tokenize(t)), k["relation"], k["num_sentences"]
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda t, k: _compared(
        len(re.findall(r"\w+", t)), k["relation"], k["num_words"]
    ),
    "length_constraints:nth_paragraph_first_word": _nth_first_word,
    "detectable_content:number_placeholders": lambda t, k: _placeholders(t) >= k["num_placeholders"],
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda t, k: any(answer in t for answer in _ANSWERS),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": lambda t, k: (
        len(re.findall(rf"\s?{re.escape(k['section_spliter'].strip())}\s?\d+\s?", t)) >= k["num_sections"]
    ),
    "detectable_format:json_format": _json,
    "detectable_format:title": lambda t, k: any(m.lstrip("<").rstrip(">").strip() for m in _titles(t)),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda t, k: t.strip().lower().startswith(k["prompt_to_repeat"].strip().lower()),
    "startend:end_checker": lambda t, k: t.strip().strip('"').lower().endswith(k["end_phrase"].strip().lower()),
    "startend:quotation": lambda t, k: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"',
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda t, k: t.isupper() and _in_language(t, "en"),
    "change_case:english_lowercase": lambda t, k: t.islower() and _in_language(t, "en"),
    "punctuation:no_comma": lambda t, k: "," not in t,
}
"""IFEval's instructions by name: what a text must be, given the instruction's settings."""
