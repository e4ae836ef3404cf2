"""Table to text: a sentence that says what the marked cells, or triples, say.

Original: ToTTo, arXiv 2004.14373, the highlighted cells with all headers to their left and above, as in its authors'
baselines, and their program's PARENT, over two tables: recall is of the highlighted cells and the titles (`table`),
precision of the whole table with titles and the section's text (`precision_table`). Departures: in the prompt places
count `row_span` too, and the headers of other rows are not a column's.

Stand-in: DART's dev file, arXiv 2007.02871; a tenth of it by a hash is the validation split. It has one table, of
triples, so its PARENT is the one of PARENT's own authors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from steersman.grue.task import Hub, Row, Task, in_split, text_of


def page(row: Row) -> Iterable[Row]:
    """The title and section count as facts too: the sentences name what the page is about."""
    table = [["page", row["table_page_title"]], ["section", row["table_section_title"]]]
    grid = _Grid(row["table"])
    table += [[", ".join(grid.headers(r, i)), row["table"][r][i]["value"]] for r, i in row["highlighted_cells"]]
    told = row["sentence_annotations"]
    sentences = told["final_sentence"] if isinstance(told, dict) else [t["final_sentence"] for t in told]
    kept = [entry for entry in table if entry[1].strip()]
    whole = [["header" if cell["is_header"] else "cell", cell["value"]] for cells in row["table"] for cell in cells]
    whole += [*table[:2], ["text", row["table_section_text"]]]
    yield {
        "table": _bars(kept),
        "precision_table": _bars(whole),
        "facts": "; ".join(f"{name}: {value}" for name, value in kept),
        "references": sentences,
    }


def _bars(table: list[list[str]]) -> list[list[str]]:
    """The entries that have a value; its bars are hyphens, as the authors' program writes them."""
    return [[name, value.replace("|", "-")] for name, value in table if value.strip()]


class _Grid:
    """A table laid out by its spans, which says what headers a cell has."""

    def __init__(self, table: list[list[Row]]) -> None:
        self.at: dict[tuple[int, int], Row] = {}
        self.columns: dict[tuple[int, int], range] = {}
        self.values: dict[int, int] = {}  # row -> the last column with a value that is no header
        for r, cells in enumerate(table):
            column = 0
            for i, cell in enumerate(cells):
                while (r, column) in self.at:
                    column += 1
                covered = self.columns[r, i] = range(column, column + max(1, cell["column_span"]))
                for below in range(r, min(len(table), r + max(1, cell["row_span"]))):
                    self.at |= {(below, c): cell for c in covered}
                column = covered.stop
        for (r, c), cell in self.at.items():
            if not cell["is_header"] and cell["value"].strip():
                self.values[r] = max(c, self.values.get(r, 0))

    def headers(self, r: int, i: int) -> list[str]:
        """The headers of row `r` to the left of its cell `i`, and of the cell's columns above it.

        A header with values to its right is its row's, another one its columns'.
        """
        columns = self.columns[r, i]
        over = [(r, c) for c in range(columns.start) if c < self.values.get(r, 0)]
        over += [(above, c) for above in range(r) for c in columns if c >= self.values.get(above, 0)]
        cells = {id(cell): cell for place in over if (cell := self.at.get(place)) and cell["is_header"]}
        return [cell["value"] for cell in cells.values() if cell["value"].strip()]


def stand_in(folder: Path, split: str) -> Iterable[Row]:
    for item in json.loads(text_of(folder / "dart" / "dart-v1.1.1-full-dev.json")):
        triples, told = item["tripleset"], [a["text"] for a in item["annotations"] if a["text"].strip()]
        facts = "; ".join(" ".join(part.replace("_", " ") for part in triple) for triple in triples)
        if told and in_split(facts, split):
            yield {"table": triples, "facts": facts, "references": told}


PARENT = {"metric": "parent", "args": {"program": "totto"}}

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
        rewards={"parent": PARENT},
        metrics={
            "bleu": {"metric": "bleu"},
            "parent": PARENT,
            "rougeL": {"metric": "rougeL"},
            "meteor": {"metric": "meteor"},
        },
        how_to_get="the set on the hub is a loading script, which datasets 4 no longer runs; put its authors' files "
        "totto_train_data.jsonl and totto_dev_data.jsonl in sets/table-to-text/ as train.jsonl and validation.jsonl",
    ),
    files=stand_in,
)
