"""Instructions of several constraints: a task, and rules that can be kept together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from steersman.flywheel.instruct.constraints import KINDS, Constraint, draw
from steersman.flywheel.instruct.witness import witness
from steersman.types import SteersmanError

TRIES = 200
"""Draws of a composition before a number of rules is said not to go together."""
FORMS = ("{task} {rules}", "{task}\n\n{rules}", "{task}\n\nKeep to these rules:\n{listed}", "{rules}\n\n{task}")

REWRITE = """Rewrite the instruction below as one natural request. Keep the task and every rule with its exact words,
numbers and names. Write only the request.

{instruction}"""


def compose(kinds: Sequence[str], count: int, rng: random.Random) -> list[Constraint]:
    """So many rules of different kinds that some text keeps all of.

    Raises SteersmanError where none was found, or there are fewer kinds than rules.
    """
    if count > len(kinds):
        raise SteersmanError(f"constraints: {count} rules need as many kinds, and there are {len(kinds)}")
    for _ in range(TRIES):
        rules = [draw(name, rng) for name in rng.sample(sorted(kinds), count)]
        if witness(rules) is not None:
            return rules
    raise SteersmanError(
        f"constraints: no {count} rules of {', '.join(kinds)} were found that can be kept together; give more kinds "
        "or fewer rules"
    )


def instruction_text(task: str, rules: Sequence[Constraint], rng: random.Random) -> str:
    """Task and rules as one instruction, in one of several forms."""
    texts = [r.text for r in rules]
    listed = "\n".join(f"- {t}" for t in texts)
    form = rng.choice(FORMS)
    return form.replace("{rules}", " ".join(texts)).replace("{listed}", listed).replace("{task}", task.strip())


def keeps_the_rules(rewritten: str, rules: Sequence[Constraint]) -> bool:
    """Whether an instruction in other words still has every number, word and phrase of the rules."""
    text = rewritten.lower()
    return bool(text.strip()) and all(str(x).lower() in text for rule in rules for x in _parts(rule.kwargs))


def _parts(kwargs: dict[str, Any]) -> list[Any]:
    """What a rule's settings name; relations can be said in many ways."""
    kept = {k: v for k, v in kwargs.items() if not k.endswith("relation")}
    return [x for value in kept.values() for x in (value if isinstance(value, list) else [value])]


def split_kinds(kinds: Sequence[str], held_out: Sequence[str]) -> tuple[list[str], list[str]]:
    """Kinds to train on and kinds held out. Raises SteersmanError for names that are none, or nothing left."""
    known = list(kinds) or list(KINDS)
    for name in [*known, *held_out]:
        if name not in KINDS:
            raise SteersmanError(f"constraints: there is no kind {name!r}; there are {', '.join(KINDS)}")
    left = [name for name in known if name not in held_out]
    if not left:
        raise SteersmanError("constraints.held_out: no kind is left to train on")
    return left, list(held_out)
