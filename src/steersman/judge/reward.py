"""A judge as a reward of any on-policy verb.

reward:
  parts:
    judge:
      function: steersman.judge.reward:grade
      args: {judge: {endpoint: {url: "http://localhost:8000/v1", model: my-judge}, cache: runs/judge.jsonl}}

`grade_turns` in its place grades each turn of an episode by itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError

from steersman.judge.config import JudgeConfig
from steersman.judge.judge import Judge
from steersman.judge.prompts import verdict
from steersman.types import Sample, SteersmanError


def grade(prompts: Sequence[str], completions: Sequence[str], *, judge: dict[str, Any]) -> list[float]:
    """The judge's grade of each completion; the middle of the scale where its reply had none, or there was
    no reply (`on_failed: drop`).

    `judge` is a judge section. Raises SteersmanError where it is none, and as the judge does.
    """
    opened = _open(json.dumps(judge, sort_keys=True))
    low, high = opened.config.scale
    grades = opened.grade(list(zip(prompts, completions, strict=True)))
    return [(low + high) / 2 if g is None else g for g in grades]


def agreement(
    prompts: Sequence[str], completions: Sequence[str], *, winner: Sequence[str], unreadable: float = -0.5
) -> list[float]:
    """1 where a written verdict is the row's `winner` (A or B), 0 where it is the other or a tie, `unreadable` where
    there is none: the reward that trains a judge (`steersman judge-lessons` makes the rows).

    Raises SteersmanError for a winner that is neither A nor B.
    """
    wanted = {"A": 1.0, "B": 0.0}
    for row, letter in enumerate(winner):
        if letter not in wanted:
            raise SteersmanError(f"reward agreement: winner is {str(letter)[:40]!r} in row {row} of a batch; A or B")
    said = [verdict(text) for text in completions]
    return [unreadable if v is None else float(v == wanted[w]) for v, w in zip(said, winner, strict=True)]


def grade_turns(
    prompts: Sequence[str], completions: Sequence[str], *, samples: Sequence[Sample], judge: dict[str, Any]
) -> list[list[float]]:
    """The judge's grade of every turn of an episode, at the turn's last token; 0 at all other tokens.

    A turn is judged behind everything that was said before it. A reply without grade counts as the middle of the
    scale. Raises SteersmanError as `grade` does, and for samples that are no episodes.
    """
    asked: list[str] = []
    for sample in samples:
        if sample.turns is None:
            raise SteersmanError("reward: grade_turns judges the turns of episodes; the recipe has no `environment`")
        so_far = sample.prompt.text
        for turn in sample.turns:
            asked.append(so_far)
            so_far += f"{turn.reply}\n{turn.observation}\n"
    grades = iter(grade(asked, [t.reply for s in samples for t in s.turns or []], judge=judge))
    out = [[0.0] * len(s.ids) for s in samples]
    for row, sample in zip(out, samples, strict=True):
        for turn in sample.turns or []:
            row[turn.end - 1] += next(grades)
    return out


@cache
def _open(section: str) -> Judge:
    try:
        config = JudgeConfig.model_validate(json.loads(section))
    except ValidationError as error:
        raise SteersmanError(f"reward args.judge: not a judge section: {error}") from error
    return Judge(config)
