"""A judge as a reward of any on-policy verb.

reward:
  parts:
    judge:
      function: steersman.judge.reward:grade
      args: {judge: {endpoint: {url: "http://localhost:8000/v1", model: my-judge}, cache: runs/judge.jsonl}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError

from steersman.judge.config import JudgeConfig
from steersman.judge.judge import Judge
from steersman.types import SteersmanError


def grade(prompts: Sequence[str], completions: Sequence[str], *, judge: dict[str, Any]) -> list[float]:
    """The judge's grade of each completion; the middle of the scale where its reply had none.

    `judge` is a judge section. Raises SteersmanError where it is none, and as the judge does.
    """
    opened = _open(json.dumps(judge, sort_keys=True))
    low, high = opened.config.scale
    grades = opened.grade(list(zip(prompts, completions, strict=True)))
    return [(low + high) / 2 if g is None else g for g in grades]


@cache
def _open(section: str) -> Judge:
    try:
        config = JudgeConfig.model_validate(json.loads(section))
    except ValidationError as error:
        raise SteersmanError(f"reward args.judge: not a judge section: {error}") from error
    return Judge(config)
