"""Constraints that a program can check: IFEval's kinds, said in words, with settings drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steersman.metrics.ifeval import CHECKS

WORDS = (
    "bridge", "candle", "forest", "garden", "harvest", "island", "letter", "market", "mirror", "morning", "music",
    "paper", "pepper", "river", "saddle", "silver", "thunder", "velvet", "window", "winter",
)  # fmt: skip
"""Words that rules name."""
PHRASES = ("That is all.", "Hope this helps.", "Is there anything else?", "Thank you for reading.")


@dataclass(frozen=True, slots=True)
class Constraint:
    """One rule: IFEval's name of its kind, the kind's settings, and the rule in words."""

    name: str
    kwargs: dict[str, Any]
    text: str

    def holds(self, answer: str) -> bool:
        """Whether an answer keeps it; an empty one keeps none."""
        return bool(answer.strip()) and bool(CHECKS[self.name](answer, self.kwargs))

    def row(self) -> dict[str, Any]:
        return {"name": self.name, "kwargs": self.kwargs, "text": self.text}


Draw = Callable[[random.Random], tuple[dict[str, Any], tuple[str, ...]]]
"""Settings, and ways to say the rule."""


def _keywords(rng: random.Random):
    words = sorted(rng.sample(WORDS, rng.randint(1, 3)))
    listed = " and ".join(f'"{w}"' for w in words)
    return {"keywords": words}, (f"Use the words {listed}.", f"Include {listed} in your answer.")


def _frequency(rng: random.Random):
    word, count = rng.choice(WORDS), rng.randint(2, 4)
    told = {"keyword": word, "frequency": count, "relation": "at least"}
    return told, (f'Use the word "{word}" at least {count} times.', f'"{word}" must appear {count} or more times.')


def _forbidden(rng: random.Random):
    words = sorted(rng.sample(WORDS, 2))
    return {"forbidden_words": words}, (f'Do not use the words "{words[0]}" and "{words[1]}".',)


def _letter(rng: random.Random):
    letter, count = rng.choice("bcfgjkqvwxz"), rng.randint(3, 8)
    told = {"letter": letter, "let_frequency": count, "let_relation": "at least"}
    return told, (f'Use the letter "{letter}" at least {count} times.',)


def _sentences(rng: random.Random):
    relation, count = rng.choice(("at least", "less than")), rng.randint(3, 6)
    told = {"relation": relation, "num_sentences": count}
    return told, (f"Answer in {relation} {count} sentences.",)


def _number_of_words(rng: random.Random):
    relation, count = rng.choice((("at least", 30), ("at least", 60), ("less than", 80), ("less than", 120)))
    return {"relation": relation, "num_words": count}, (f"Answer with {relation} {count} words.",)


def _paragraphs(rng: random.Random):
    count = rng.randint(2, 3)
    return {"num_paragraphs": count}, (f"Write {count} paragraphs, set apart by a line of ***.",)


def _first_word(rng: random.Random):
    count, word = rng.randint(2, 3), rng.choice(WORDS)
    nth = rng.randint(1, count)
    told = {"num_paragraphs": count, "nth_paragraph": nth, "first_word": word}
    return told, (
        f'Write {count} paragraphs, set apart by an empty line; paragraph {nth} must start with the word "{word}".',
    )


def _placeholders(rng: random.Random):
    count = rng.randint(1, 3)
    return {"num_placeholders": count}, (f"Leave at least {count} placeholders in square brackets, such as [name].",)


def _postscript(rng: random.Random):
    return {"postscript_marker": "P.S."}, ("Add a postscript that begins with P.S. at the end.",)


def _bullets(rng: random.Random):
    count = rng.randint(2, 5)
    return {"num_bullets": count}, (f"Write exactly {count} bullet points, each line beginning with *.",)


def _choice(rng: random.Random):
    return {}, ('Answer with one of "My answer is yes.", "My answer is no." and "My answer is maybe."',)


def _highlights(rng: random.Random):
    count = rng.randint(1, 3)
    return {"num_highlights": count}, (f"Highlight at least {count} parts with asterisks, as in *this part*.",)


def _sections(rng: random.Random):
    count = rng.randint(2, 3)
    told = {"section_spliter": "Section", "num_sections": count}
    return told, (f"Write {count} sections, each headed Section X, as in Section 1.",)


def _end(rng: random.Random):
    phrase = rng.choice(PHRASES)
    return {"end_phrase": phrase}, (f'End with exactly these words: "{phrase}"',)


def _capitals(rng: random.Random):
    relation, count = rng.choice(("at least", "less than")), rng.randint(2, 5)
    told = {"capital_relation": relation, "capital_frequency": count}
    return told, (f"Use {relation} {count} words all in capital letters.",)


def _said(*texts: str) -> Draw:
    return lambda rng: ({}, texts)


KINDS: dict[str, Draw] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_words": _number_of_words,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _choice,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _said("Put the whole answer into JSON.", "Answer in JSON only."),
    "detectable_format:title": _said("Give the answer a title in double angle brackets, such as <<a title>>."),
    "combination:two_responses": _said("Give two different answers, set apart by ******."),
    "startend:end_checker": _end,
    "startend:quotation": _said("Put the whole answer into double quotation marks."),
    "change_case:capital_word_frequency": _capitals,
    "punctuation:no_comma": _said("Do not use any commas.", "Write without commas."),
}
"""Kinds by IFEval's names: all that need no detector of languages and no copy of the prompt."""


def draw(name: str, rng: random.Random) -> Constraint:
    """One constraint of a kind."""
    kwargs, texts = KINDS[name](rng)
    return Constraint(name, kwargs, rng.choice(texts))


def again(row: dict[str, Any]) -> Constraint:
    """The constraint of a row."""
    return Constraint(row["name"], row["kwargs"], row["text"])
