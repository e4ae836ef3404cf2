"""Translation, English to German.

Original: WMT16 de-en (the paper has IWSLT 2017 too). Stand-in: NTREX-128's news, English to German, whole documents
on one side of the split; it is far too small to learn translation from, so it shows the machinery alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from steersman.grue.task import Hub, Row, Task, in_split, text_lines


def pair(row: Row) -> Iterable[Row]:
    yield {"source": row["translation"]["en"], "references": [row["translation"]["de"]]}


def stand_in(folder: Path, split: str) -> Iterable[Row]:
    here = folder / "ntrex"
    files = ("DOCUMENT_IDS.tsv", "newstest2019-src.eng.txt", "newstest2019-ref.deu.txt")
    for document, english, german in zip(*(text_lines(here / name) for name in files), strict=True):
        if in_split(document, split):
            yield {"source": english, "references": [german]}


TASK = Task(
    name="translation",
    about="English to German",
    prompt="Translate English to German: {source}\nGerman:",
    rewards={"chrf": {"metric": "chrf", "weight": 0.01}},
    metrics={
        "sacrebleu": {"metric": "sacrebleu"},
        "chrf": {"metric": "chrf"},
        "ter": {"metric": "ter"},
        "meteor": {"metric": "meteor"},
    },
    generation={"max_new_tokens": 64, "temperature": 0.7, "top_k": 50},
    original=Hub(
        "wmt/wmt16",
        {"train": "train", "validation": "validation", "test": "test"},
        pair,
        subset="de-en",
    ),
    files=stand_in,
)
