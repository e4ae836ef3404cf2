"""A model reads what a user's turn says about the answer before it: the kind, and the words that say it.

A reading counts only where its words stand in the turn: what a model imagines is told from what it read. Source of
the task: arXiv 2407.10944, section 4 (a language model finds the spans of feedback and their categories).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from steersman.flywheel.conversations import Exchange
from steersman.flywheel.reactions import DOWN
from steersman.judge.prompts import code_of, fill
from steersman.judge.writer import Writer

KINDS = ("praise", *DOWN, "mixed", "none")
ASK = """A user talks with an assistant. Say what the user's newest turn says about the assistant's last answer:

praise: thanks for it, or finds it good
complaint: finds it bad or useless, without saying what would be right
correction: says what is wrong in it, or what was meant
clarification: does not understand it, or doubts it
rephrase: asks the same thing again
mixed: praises one part and complains of another
none: says nothing about it, such as a new question

<asked {code}>
{asked}
</asked {code}>

<answer {code}>
{answer}
</answer {code}>

<newest turn {code}>
{turn}
</newest turn {code}>

Reply with two lines and nothing else:
KIND: one of the words above
SPAN: the words of the newest turn that say so, copied; empty for none"""
REVISE = """A user asked an assistant, got an answer, and said what they think of it. Write the answer that the user
should have got. Write only the answer.

<asked {code}>
{asked}
</asked {code}>

<answer {code}>
{answer}
</answer {code}>

<the user says {code}>
{turn}
</the user says {code}>"""
LONGEST = 2000
"""Letters of each part of an exchange that a reader is shown: the last ones of what was asked and answered, the first
ones of the turn."""
_LINE = re.compile(r"^\W*(kind|span)\W*:(.*)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a turn says, and the words of it that say so."""

    kind: str
    span: str = ""


def read(found: Sequence[Exchange], writer: Writer) -> list[Reading | None]:
    """What each user's turn says; None where the reply names no kind, or words that the turn does not have."""
    replies = writer.write([fill(ASK, _holes(e)) for e in found], cut=True)  # what is read is held against the turn
    return [
        None if reply is None else parse_reading(reply, e.reaction) for reply, e in zip(replies, found, strict=True)
    ]


def revise(found: Sequence[Exchange], writer: Writer) -> list[str | None]:
    """The answer that each user should have got; None where nothing new was written, or a limit cut it."""
    replies = writer.write([fill(REVISE, _holes(e)) for e in found])
    return [
        None if reply is None or reply.strip() in ("", e.answer.strip()) else reply.strip()
        for reply, e in zip(replies, found, strict=True)
    ]


def parse_reading(reply: str, turn: str) -> Reading | None:
    """The reading that a reply gives; the first line of each name counts."""
    told: dict[str, str] = {}
    for line in reply.splitlines():
        found = _LINE.match(line)
        if found is not None:
            told.setdefault(found[1].lower(), found[2].strip())
    kind = told.get("kind", "").strip(" .*\"'").lower()
    if kind not in KINDS:
        return None
    if kind == "none":
        return Reading(kind)
    span = told.get("span", "").strip(" \"'“”")
    plain = _plain(span)
    return Reading(kind, span) if plain and plain in _plain(turn) else None


def _holes(e: Exchange) -> dict[str, str]:
    shown = {"asked": e.last_question[-LONGEST:], "answer": e.answer[-LONGEST:], "turn": e.reaction[:LONGEST]}
    return shown | {"code": code_of(*shown.values())}


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w]+", " ", text.replace("’", "'").lower()).split())
