"""`steersman judge-lessons`: people's pairs as questions to a judge that writes, for training it by reinforcement.

    pair (prompt, chosen, rejected)  ->  the question with the chosen answer first,  winner A
                                         the question with it second,                winner B

GRPO (or any on-policy verb) on these rows, rewarded by `steersman.judge.reward:agreement`, trains a generative judge:
it writes what it weighs and a verdict, and is paid where the verdict is the people's. Each pair is asked in both
orders, so that a preference for a place earns half. Source: J1, arXiv 2505.10320 (verdicts as verifiable
rewards, both orders); JudgeLRM, arXiv 2504.00050. Departure: no extra reward for verdicts that agree in both orders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from steersman.atomic import write_atomic
from steersman.config.sections import Section, key_names
from steersman.data import ROWS_TO_TOKENS, DataConfig, Preference, keys_of_other_kinds, preferences
from steersman.jsonl import jsonl_text
from steersman.judge import prompts
from steersman.judge.config import RUBRIC
from steersman.judge.scored import as_text
from steersman.types import SteersmanError


class JudgeLessonsRecipe(Section):
    """Pairs as questions with their winners."""

    data: DataConfig
    out: str = Field(description="file of questions to write (.jsonl)")
    held_out: str | None = Field(
        default=None, description="file for the questions of the data's held-out pairs; null writes none"
    )
    rubric: str = Field(default=RUBRIC, description="what the judge looks at")
    compare: str = Field(
        default=prompts.COMPARE, description="template with {rubric}, {prompt}, {first}, {second} and {code}"
    )

    @field_validator("compare")
    @classmethod
    def _has_holes(cls, value: str) -> str:
        for hole in ("first", "second"):
            if f"{{{hole}}}" not in value:
                raise ValueError(f"the template has no {{{hole}}}, so the judge would not see that answer")
        return value

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return keys_of_other_kinds("preference") | key_names(data=("mix", "shuffle", *ROWS_TO_TOKENS))


def run(recipe: JudgeLessonsRecipe) -> dict[str, Any]:
    """Writes the questions, two for each decided pair, and returns how many there are."""
    loaded = preferences(recipe.data)
    made = {"questions": (recipe.out, loaded.train)}
    if recipe.held_out is not None:
        if not loaded.held_out:
            raise SteersmanError("held_out names a file, but data.held_out holds no pairs out; give both, or neither")
        made["held_out"] = (recipe.held_out, loaded.held_out)
    counts = {}
    for name, (path, pairs) in made.items():
        rows = [row for i, pair in enumerate(pairs) for row in questions(pair, i, recipe)]
        if not rows:
            raise SteersmanError(f"{recipe.data.path}: raters are evenly split on all pairs, so no verdict is right")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), jsonl_text(rows))
        counts[name] = len(rows)
    print(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))
    return counts


def questions(pair: Preference, number: int, recipe: JudgeLessonsRecipe) -> list[dict[str, Any]]:
    """The pair in both orders, with the letter of the answer that most raters preferred; nothing where they tied."""
    if pair.agreement == 0.5:
        return []
    answers = [as_text(pair.chosen), as_text(pair.rejected)]
    rows = []
    for first in (0, 1):
        values = {
            "rubric": recipe.rubric, "prompt": as_text(pair.prompt),
            "first": answers[first], "second": answers[1 - first],
            "code": prompts.code_of(as_text(pair.prompt), answers[first], answers[1 - first]),
        }  # fmt: skip
        wins_first = (first == 0) == (pair.agreement > 0.5)
        rows.append(
            {"prompt": prompts.fill(recipe.compare, values), "winner": "A" if wins_first else "B", "pair": number}
        )
    return rows
