"""Narrative question answering: a question about a story, its answer in a few words.

Original: NarrativeQA, arXiv 1712.07040, over the summaries. Stand-in: FairytaleQA, arXiv 2203.13947, over the
sections that a question is about, with its own splits.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from steersman.grue.task import Hub, Row, Task, text_of


def question(row: Row) -> Iterable[Row]:
    yield {
        "story": row["document"]["summary"]["text"],
        "question": row["question"]["text"],
        "references": [answer["text"] for answer in row["answers"]],
    }


def stand_in(folder: Path, split: str) -> Iterable[Row]:
    name = {"train": "train", "validation": "val", "test": "test"}[split]

    def table(kind: str) -> Iterable[dict[str, str]]:
        return csv.DictReader(text_of(folder / "fairytaleqa" / f"{kind}_{name}.csv").splitlines(keepends=True))

    sections = {(row["story"], row["section"].strip()): row["text"] for row in table("sections")}
    for row in table("questions"):
        numbers = [n.strip() for n in row["cor_section"].split(",")]
        story = " ".join(sections.get((row["story"], n), "") for n in numbers).strip()
        answers = [row[f"answer{i}"].strip() for i in range(1, 7) if (row[f"answer{i}"] or "").strip()]
        if story and answers:
            yield {"story": story, "question": row["question"], "references": list(dict.fromkeys(answers))}


TASK = Task(
    name="narrative-qa",
    about="a question about a story, answered in a few words",
    prompt="{story}\nQuestion: {question}\nAnswer:",
    cut="story",
    words=300,
    rewards={"token_f1": {"metric": "token_f1"}},
    metrics={
        "rougeL": {"metric": "rougeL"},
        "token_f1": {"metric": "token_f1"},
        "exact_match": {"metric": "exact_match"},
        "meteor": {"metric": "meteor"},
    },
    generation={"max_new_tokens": 24, "temperature": 0.7, "top_k": 50},
    original=Hub("deepmind/narrativeqa", {"train": "train", "validation": "validation", "test": "test"}, question),
    files=stand_in,
    file_splits=("train", "validation", "test"),
)
