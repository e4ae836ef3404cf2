"""Concepts to a sentence: say something that uses every given word.

Original: CommonGen, arXiv 1911.03705; its test references are not public. Stand-in: lists and sentences in plain
text, dev as validation.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from steersman.grue.task import Hub, Row, Task, text_lines


def example(row: Row) -> Iterable[Row]:
    yield {"concepts": list(row["concepts"]), "references": [row["target"]]}


def stand_in(folder: Path, split: str) -> Iterable[Row]:
    name = {"train": "train", "validation": "dev"}[split]
    concepts = text_lines(folder / "commongen" / f"commongen.{name}.src_alpha.txt")
    sentences = text_lines(folder / "commongen" / f"commongen.{name}.tgt.txt")
    for line, sentence in zip(concepts, sentences, strict=True):
        yield {"concepts": line.split(), "references": [sentence]}


TASK = Task(
    name="commongen",
    about="concepts to a sentence that uses them all",
    prompt="Words: {concepts}. Sentence:",
    rewards={"rougeL": {"metric": "rougeL"}},
    metrics={
        "rouge2": {"metric": "rouge2"},
        "rougeL": {"metric": "rougeL"},
        "bleu": {"metric": "bleu"},
        "meteor": {"metric": "meteor"},
        "cider": {"metric": "cider"},
        "coverage": {"metric": "concept_coverage"},
    },
    generation={"max_new_tokens": 28, "temperature": 0.8, "top_k": 50},
    original=Hub("allenai/common_gen", {"train": "train", "validation": "validation"}, example),
    files=stand_in,
)
