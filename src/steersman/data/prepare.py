"""What a data section asks for beyond a format: renamed columns, prompt templates, ties, ranges, opening words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from steersman.data import fields as f
from steersman.data.config import DataConfig
from steersman.data.examples import (
    Content,
    Demonstration,
    Example,
    Feedback,
    Preference,
    Query,
    Ranking,
    Rating,
    Steps,
    has_ties,
)
from steersman.data.prompt_template import PromptTemplate
from steersman.data.rows import BadRows, Row, RowError, nearest


def prepared_rows(rows: Iterator[Row], config: DataConfig, bad: BadRows) -> Iterator[Row]:
    """The rows with what the section asks for done to their columns.

    Raises SteersmanError for a prompt template that no row could fill, and as `bad` says for a row that can not be
    prepared.
    """
    written = config.prompt_template
    template = None if written is None else PromptTemplate.parse(written, "data.prompt_template")
    for row in rows:
        try:
            _rename(row, config, template)
        except RowError as error:
            bad.add(error)
        else:
            yield row


def _rename(row: Row, config: DataConfig, template: PromptTemplate | None) -> None:
    """Canonical names for the user's columns, the prompt from its template, the ratings in one place."""
    for column in config.json_columns:
        if row.data.get(column) is not None:
            row.data = row.data | {column: f.json_text(row, column)}
    added: dict[str, Any] = {}
    for name, column in config.columns.items():
        if column not in row.data:
            has = ", ".join(map(repr, row.data))
            raise row.fault(
                "missing field",
                f"data.columns maps {name!r} to {column!r}, which the row has not (it has {has})"
                f"{nearest(column, row.data)}",
                column,
            )
        added[name] = row.data[column]
        row.names[name] = column
    if template is not None:
        added["prompt"] = template.fill(row)
    if config.scores:
        added["scores"] = {name: row.data.get(name) for name in config.scores}
    row.data = row.data | added


def finish_example(example: Example, config: DataConfig, bad: BadRows) -> bool:
    """Options that need the finished example: opening words, prefix, ties, range."""
    if isinstance(example, Query) and isinstance(example.prompt, str) and config.opening_words and _is_text(example):
        example.prompt = _opening(example.prompt, config.opening_words)
    if config.completion_prefix:
        _prefix(example, config.completion_prefix)
    if isinstance(example, Steps):
        example.separator = config.step_separator
        split_again = [s for s in example.steps if sum(bool(p.strip()) for p in s.split(example.separator)) > 1]
        if split_again:
            raise example.row.fault(
                "step labels do not match steps",
                f"the step {split_again[0][:40]!r} holds data.step_separator {example.separator!r}, so it would be "
                "several steps with one label",
                "steps",
            )
    if has_ties(example) and config.ties != "keep":
        fault = example.row.fault("tie", "the answers are tied (data.ties: keep or drop says what to do with ties)")
        if config.ties == "stop":
            raise fault
        bad.note("tie", str(fault))
        return False
    if isinstance(example, Rating) and config.score_range:
        low, high = config.score_range
        for name, score in example.scores.items():
            if not low <= score <= high:
                raise example.row.fault("out of range", f"must lie between {low:g} and {high:g}, not {score:g}", name)
    return True


def _is_text(example: Query) -> bool:
    return "prompt" not in example.row.data


def _opening(body: str, words: int) -> str:
    """The first words, their spacing kept."""
    end = 0
    for _ in range(words):
        while end < len(body) and body[end].isspace():
            end += 1
        while end < len(body) and not body[end].isspace():
            end += 1
    return body[:end]


def _prefix(example: Example, prefix: str) -> None:
    def put(answer: Content) -> Content:
        return prefix + answer if isinstance(answer, str) and not answer.startswith(prefix) else answer

    if isinstance(example, Preference):
        example.chosen, example.rejected = put(example.chosen), put(example.rejected)
        example.gold = None if example.gold is None else put(example.gold)
    elif isinstance(example, Ranking):
        example.completions = [put(c) for c in example.completions]
    elif isinstance(example, Demonstration | Feedback | Rating) and example.prompt:
        example.completion = put(example.completion)
    elif isinstance(example, Steps) and isinstance(example.prompt, str):
        example.steps = [str(put(example.steps[0])), *example.steps[1:]]
