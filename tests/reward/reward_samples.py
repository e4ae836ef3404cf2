"""Samples for the tests of this folder."""

from __future__ import annotations

from typing import Any

from steersman.types import Finish, Prompt, Sample


def make_samples(texts: list[str], rows: list[dict[str, Any]] | None = None, finish: Finish = "eos") -> list[Sample]:
    """One sample per text, with one id per word and an end token."""
    rows = rows or [{}] * len(texts)
    return [
        Sample(
            Prompt([5, 6], f"prompt {i}", row, i),
            [*range(10, 10 + len(text.split())), 2],
            [0.0] * (len(text.split()) + 1),
            finish,
            text,
        )
        for i, (text, row) in enumerate(zip(texts, rows, strict=True))
    ]
