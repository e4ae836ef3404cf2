"""Summarisation: a long text in a sentence or three.

Original: CNN/DailyMail 3.0.0, arXiv 1506.03340. Stand-in: SciTLDR, arXiv 2004.15011, abstracts of papers with one
or several one-sentence summaries; a tenth of it by a hash is the validation split.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from steersman.grue.task import Hub, Row, Task, in_split, json_lines


def article(row: Row) -> Iterable[Row]:
    yield {"document": row["article"], "references": [row["highlights"]]}


def stand_in(folder: Path, split: str) -> Iterable[Row]:
    for row in json_lines(folder / "scitldr" / "train.jsonl"):
        if in_split(row["paper_id"], split):
            yield {"document": " ".join(row["source"]), "references": row["target"]}


TASK = Task(
    name="summarisation",
    about="a document in short",
    prompt="{document}\nSummary:",
    cut="document",
    words=360,
    rewards={"rouge1": {"metric": "rouge1"}},
    metrics={
        "rouge1": {"metric": "rouge1"},
        "rouge2": {"metric": "rouge2"},
        "rougeL": {"metric": "rougeL"},
        "meteor": {"metric": "meteor"},
    },
    generation={"max_new_tokens": 64, "temperature": 0.7, "top_k": 50},
    original=Hub(
        "abisee/cnn_dailymail",
        {"train": "train", "validation": "validation", "test": "test"},
        article,
        subset="3.0.0",
    ),
    files=stand_in,
)
