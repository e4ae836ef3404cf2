"""Rows that rate one answer each -> rows that rank the answers to one prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from steersman.data import fields as f
from steersman.data.rows import BadRows, Row, RowError


def rank_ratings(rows: Iterable[Row], by: Sequence[str], bad: BadRows) -> list[Row]:
    """One row (prompt, responses, scores) for every prompt that has two answers at least; higher scores are better.

    Rows need `prompt` and `completion` (see data.columns) and the columns `by`, whose sum ranks. An answer that
    occurs twice under a prompt keeps its first score; what is left out is counted. Other columns are those of the
    prompt's first row.
    """
    groups: dict[str, Row] = {}
    for row in rows:
        try:
            prompt, answer = f.prompt(row), f.text(row, "completion")
            score = sum(f.number(row, column) for column in by)
        except RowError as error:
            bad.add(error)
            continue
        key = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
        whole = groups.setdefault(
            key, Row(row.data | {"prompt": prompt, "responses": [], "scores": []}, row.file, row.number, row.unit)
        )
        if answer.strip() in (r.strip() for r in whole.data["responses"]):
            bad.note("answer given twice", row.where("completion"))
            continue
        whole.data["responses"].append(answer)
        whole.data["scores"].append(score)
    for whole in groups.values():
        if len(whole.data["responses"]) < 2:
            bad.note("prompt with one answer only", whole.where("prompt"))
    return [whole for whole in groups.values() if len(whole.data["responses"]) > 1]
