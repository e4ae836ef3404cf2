"""Table to text: a sentence that says what the marked cells, or triples, say.

Original: ToTTo, arXiv 2004.14373, the highlighted cells with the headers above them. Stand-in: DART's dev file,
arXiv 2007.02871; a tenth of it by a hash is the validation split.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from steersman.grue.task import Hub, Row, Task, in_split, text_of


def page(row: Row) -> Iterable[Row]:
    """The title and section count as facts too: the sentences name what the page is about."""
    table = [["page", row["table_page_title"]], ["section", row["table_section_title"]]]
    for r, c in row["highlighted_cells"]:
        header = next(
            (cells[c]["value"] for cells in row["table"][:r] if c < len(cells) and cells[c]["is_header"]), ""
        )
        table.append([header, row["table"][r][c]["value"]])
    told = row["sentence_annotations"]
    sentences = told["final_sentence"] if isinstance(told, dict) else [t["final_sentence"] for t in told]
    kept = [entry for entry in table if entry[1].strip()]
    yield {"table": kept, "facts": "; ".join(f"{name}: {value}" for name, value in kept), "references": sentences}


def stand_in(folder: Path, split: str) -> Iterable[Row]:
    for item in json.loads(text_of(folder / "dart" / "dart-v1.1.1-full-dev.json")):
        triples, told = item["tripleset"], [a["text"] for a in item["annotations"] if a["text"].strip()]
        facts = "; ".join(" ".join(part.replace("_", " ") for part in triple) for triple in triples)
        if told and in_split(facts, split):
            yield {"table": triples, "facts": facts, "references": told}


TASK = Task(
    name="table-to-text",
    about="a sentence that says what a table says",
    prompt="Facts: {facts}. Sentence:",
    cut="facts",
    words=120,
    rewards={"parent": {"metric": "parent"}},
    metrics={
        "bleu": {"metric": "bleu"},
        "parent": {"metric": "parent"},
        "rougeL": {"metric": "rougeL"},
        "meteor": {"metric": "meteor"},
    },
    generation={"max_new_tokens": 48, "temperature": 0.7, "top_k": 50},
    original=Hub(
        "google-research-datasets/totto",
        {"train": "train", "validation": "validation"},
        page,
        how_to_get="the set on the hub is a loading script, which datasets 4 no longer runs; put its authors' files "
        "totto_train_data.jsonl and totto_dev_data.jsonl in sets/table-to-text/ as train.jsonl and validation.jsonl",
    ),
    files=stand_in,
)
