"""Can rules be kept together? A text that keeps them all is the proof, and it is written here.

The text means nothing. A composition of constraints is used only where one was found, so that no instruction
contradicts itself; some that could be kept are lost where this way of writing does not find how.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import Any

from steersman.flywheel.instruct.constraints import Constraint

LONG = 150
"""Most words of filler that are tried."""


def witness(rules: Sequence[Constraint]) -> str | None:
    """A text that keeps every rule, or None where none was found."""
    for filler in (0, 1, 3, 5, 12, 40, 75, LONG):
        for stop in (False, True):
            text = _written({r.name: r.kwargs for r in rules}, filler, stop)
            if all(r.holds(text) for r in rules):
                return text
    return None


def _written(rules: dict[str, dict[str, Any]], filler: int, stop: bool) -> str:
    """One try: what the rules ask for, and so many words between; with `stop` each of them is a sentence."""
    words = _wanted(rules)
    free = [f"{w}." if stop else w for w in _fillers(rules, filler)]
    body = " ".join([*words, *free]) or "so"
    if "detectable_format:json_format" in rules:
        return json.dumps({"answer": _ended(body, rules, "")})
    pieces = [body]
    if "length_constraints:nth_paragraph_first_word" in rules:
        k = rules["length_constraints:nth_paragraph_first_word"]
        pieces = ["so"] * k["num_paragraphs"]
        pieces[k["nth_paragraph"] - 1] = k["first_word"]
        pieces[-1] += f" {body}"
        body = "\n\n".join(pieces)
    elif "length_constraints:number_paragraphs" in rules:
        more = rules["length_constraints:number_paragraphs"]["num_paragraphs"] - 1
        body = "\n***\n".join([*["so"] * more, body])
    elif "combination:two_responses" in rules:
        body = f"so\n******\n{body}"
    if "detectable_format:multiple_sections" in rules:
        k = rules["detectable_format:multiple_sections"]
        body += "".join(f"\n{k['section_spliter']} {i + 1}\nso" for i in range(k["num_sections"]))
    if "detectable_format:number_bullet_lists" in rules:
        body += "".join(["\n* so"] * rules["detectable_format:number_bullet_lists"]["num_bullets"])
    if "detectable_format:title" in rules:
        body = f"{body} <<so>>" if "length_constraints:nth_paragraph_first_word" in rules else f"<<so>>\n{body}"
    return _ended(body, rules, '"' if "startend:quotation" in rules else "")


def _wanted(rules: dict[str, dict[str, Any]]) -> list[str]:
    """The words and marks that rules ask for."""
    words: list[str] = list(rules.get("keywords:existence", {}).get("keywords", []))
    if "keywords:frequency" in rules:
        k = rules["keywords:frequency"]
        words += [k["keyword"]] * k["frequency"]
    if "keywords:letter_frequency" in rules:
        k = rules["keywords:letter_frequency"]
        words.append(k["letter"] * k["let_frequency"])
    if rules.get("change_case:capital_word_frequency", {}).get("capital_relation") == "at least":
        words += ["SO"] * rules["change_case:capital_word_frequency"]["capital_frequency"]
    if "detectable_content:number_placeholders" in rules:
        words += ["[so]"] * rules["detectable_content:number_placeholders"]["num_placeholders"]
    if "detectable_format:number_highlighted_sections" in rules:
        # behind a word, so that no line begins with an asterisk
        words += ["so", *["*so*"] * rules["detectable_format:number_highlighted_sections"]["num_highlights"]]
    if "detectable_format:constrained_response" in rules:
        words.append("My answer is yes.")
    return words


def _fillers(rules: dict[str, dict[str, Any]], count: int) -> list[str]:
    forbidden = set(rules.get("keywords:forbidden_words", {}).get("forbidden_words", []))
    known = [w for w in ("so", "then", "also", *string.ascii_lowercase) if w not in forbidden]
    return [known[i % len(known)] for i in range(count)]


def _ended(body: str, rules: dict[str, dict[str, Any]], quote: str) -> str:
    if "detectable_content:postscript" in rules:
        body += "\nP.S. so"
    if "startend:end_checker" in rules:
        body += f" {rules['startend:end_checker']['end_phrase']}"
    return f"{quote}{body}{quote}"
