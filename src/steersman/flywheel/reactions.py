"""What a user's turn says about the assistant's turn before it: rules that can be read, in the taxonomy's categories.

Source of the categories: arXiv 2407.10944, section 3 (after Petrak et al. 2023): repeat or rephrase, make aware with
and without correction, ask for clarification, positive. Departure: the paper asks a language model to find them; here
patterns do, which miss most indirect feedback. A judge can take their place.
"""

from __future__ import annotations

import re
from typing import Literal

from steersman.ops.text import words

Down = Literal["complaint", "correction", "clarification", "rephrase"]
Category = Literal["praise", "mixed", "none"] | Down
DOWN: tuple[Down, ...] = ("complaint", "correction", "clarification", "rephrase")

READ = 240
"""Letters of a turn that are read: feedback stands at its beginning, before the next request."""
SAME = 0.6
"""Share of content words in common from which on a turn repeats the one before it."""

_GOOD = "good|great|nice|excellent|helpful|useful|wonderful|amazing|awesome|perfect|brilliant|fantastic|lovely|cool"
_THING = "answer|idea|point|advice|job|work|explanation|suggestion|response|info|information|tip|list|plan|one"


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


PRAISE = _any(
    r"^\W*(?:(?:ok|okay|oh|ah|wow|yes|alright|cool|great)\W+)*(?:thanks|thank you|thank u|thx|ty|cheers)\b",
    r"\b(?:many thanks|thank you (?:so|very) much|thanks (?:a lot|so much|very much))\b",
    r"\b(?:that|this|it) (?:really |totally )?(?:helps|helped|works|worked|makes sense|made sense)\b",
    rf"\b(?:{_GOOD}) (?:{_THING})s?\b",
    rf"^\W*(?:that'?s|that is|this is|it'?s|sounds|looks) (?:a |really |very |so |pretty |just )*(?:{_GOOD})\b",
    rf"^\W*(?:wow|{_GOOD})\W*(?:[!.,]|$)",
    r"\byou(?:'re| are) (?:so |very |really |absolutely )?(?:helpful|right|amazing|awesome|kind|smart|the best)\b",
    r"\bi (?:really )?(?:love|like) (?:that|this|it|your)\b",
)
CORRECTION = _any(
    r"\b(?:no|sorry|but|what),? i (?:meant|mean|said|asked|wanted)\b|^\W*i (?:meant|asked|said)\b",
    r"\b(?:that|this|it|you)(?:'s|'re| is| are| was| were) (?:just |simply |completely |totally |clearly )?"
    r"(?:wrong|incorrect|inaccurate|mistaken|false|untrue|not (?:right|true|correct|accurate))\b",
    r"\b(?:isn'?t|not) what i (?:asked|meant|said|wanted|was)\b",
    r"\byou (?:misunderstood|misread|made a mistake|forgot|missed|ignored|didn'?t (?:read|listen))\b",
)
COMPLAINT = _any(
    r"\b(?:that|this|it|you) (?:didn'?t|did not|doesn'?t|does not|don'?t|do not) (?:really |even )?"
    r"(?:answer|help|work|make (?:any )?sense|know (?:anything|what you))\b",
    r"\b(?:wasn'?t|isn'?t|not) (?:very |really |at all )?(?:helpful|useful|helping)\b",
    r"\b(?:useless|unhelpful)\b|\bthanks for nothing\b|\bfor shame\b|\bshame on you\b",
    r"\byou(?:'re| are) (?:so |really |just |an? |being )*(?:stupid|dumb|idiot|moron|rude|awful|no help)\b",
    r"\b(?:bad|poor|terrible|awful|weird|strange|horrible) (?:answer|advice|idea|response|suggestion)\b",
    r"\byou (?:still )?(?:haven'?t|have not|didn'?t|did not) answer",
)
CLARIFICATION = _any(
    r"\bwhat do you mean\b|\bwhat are you (?:talking about|saying)\b|\bwhat makes you say\b",
    r"\bi (?:don'?t|do not|didn'?t) (?:understand|get it|follow)\b",
    r"\bare you (?:sure|certain|kidding|serious|joking)\b",
    r"^\W*(?:huh|what|pardon)\W*$",
    r"\bhow (?:is|does|would) (?:that|this) (?:matter|relevant|related|help|answer)\b",
)
_NO_THANKS = _any(r"\bno,? thank", r"\bthank(?:s| you) anyway\b")
_BUT = _any(r"\b(?:but|however|though|although)\b")
_EMPTY = frozenset(
    """
    the a an of to in on at for and or is are was be do does did can could would you i me my it this that what how
    why who when where please tell give with about some have has not
    """.split()  # noqa: SIM905
)


def category(reaction: str, before: str = "") -> Category:
    """What the turn says, first match of: correction, complaint, clarification, praise, rephrase of `before`.

    "mixed" is praise with a complaint or a "but"; "none" says nothing about the answer.
    """
    head = reaction[:READ].replace("’", "'")
    good = bool(PRAISE.search(head)) and not _NO_THANKS.search(head)
    for name, pattern in (("correction", CORRECTION), ("complaint", COMPLAINT), ("clarification", CLARIFICATION)):
        if pattern.search(head):
            return "mixed" if good and name != "complaint" else name  # type: ignore[return-value]
    if good:
        return "mixed" if _BUT.search(head) else "praise"
    return "rephrase" if overlap(reaction, before) >= SAME else "none"


def overlap(a: str, b: str) -> float:
    """Content words in common over content words of either, in [0, 1]; 0 where one has fewer than three."""
    one, two = ({w for w in words(t) if w not in _EMPTY} for t in (a, b))
    return len(one & two) / len(one | two) if min(len(one), len(two)) >= 3 else 0.0
