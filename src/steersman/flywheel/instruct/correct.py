"""Answers mended one broken rule at a time, and kept where the checks pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from steersman.flywheel.instruct.constraints import Constraint
from steersman.judge.prompts import fill

ASK = """An assistant was given this instruction:

{instruction}

It answered:

{answer}

The answer breaks this rule: {rule}
Write the whole answer anew so that it keeps that rule{others}. Change nothing else. Write only the answer."""

ECHOES = ("An assistant was given this instruction", "The answer breaks this rule", "Write the whole answer anew")
"""Words of the request, which a small model says again; the checks know rules alone and would let them pass."""

Write = Callable[[Sequence[str]], list[str | None]]


@dataclass(slots=True)
class Draft:
    """An answer on its way: `answer` as it stands, `original` as it was; `rewrites` counts the model's rewrites, and
    `mended` names the rules that they put right."""

    instruction: str
    rules: list[Constraint]
    original: str
    answer: str = ""
    rewrites: int = 0
    mended: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answer = self.answer or self.original

    @property
    def broken(self) -> list[Constraint]:
        return [r for r in self.rules if not r.holds(self.answer)]

    def request(self, rule: Constraint) -> str:
        """What the corrector is asked."""
        kept = [r.text for r in self.rules if r.holds(self.answer)]
        others = f" and still these: {' '.join(kept)}" if kept else ""
        holes = {"instruction": self.instruction, "answer": self.answer, "rule": rule.text, "others": others}
        return fill(ASK, holes)

    def take(self, rule: Constraint, rewritten: str) -> bool:
        """Takes a rewrite over where it keeps the rule and those that were kept, and does not repeat the request."""
        kept = [r for r in self.rules if r.holds(self.answer)]
        if any(words in rewritten for words in ECHOES):
            return False
        if not all(r.holds(rewritten) for r in [rule, *kept]):
            return False
        self.answer = rewritten
        self.mended.append(rule.name)
        return True


def correct(drafts: Sequence[Draft], write: Write, tries: int) -> None:
    """Mends drafts in place: in each turn every unfinished draft is rewritten for its first broken rule; a rule whose
    rewrite failed goes to the end of the line, and a draft is given up after `tries` failures."""
    failures = {id(d): 0 for d in drafts}
    turn = {id(d): 0 for d in drafts}
    while True:
        open_ = [d for d in drafts if d.broken and failures[id(d)] < tries]
        if not open_:
            return
        asked = [(d, d.broken[turn[id(d)] % len(d.broken)]) for d in open_]
        # the same request again would be answered as before, so the number of the try is part of it
        texts = [d.request(rule) + (f"\n(Try {failures[id(d)] + 1}.)" * bool(failures[id(d)])) for d, rule in asked]
        for (draft, rule), reply in zip(asked, write(texts), strict=True):
            draft.rewrites += 1
            if reply is None or not draft.take(rule, reply.strip()):
                failures[id(draft)] += 1
                turn[id(draft)] += 1
