"""Texts with references: plain, empty, one word, repeated, not ASCII; and what reference programs say of them."""

import json
from pathlib import Path

KNOWN = json.loads((Path(__file__).parent / "reference_values.json").read_text(encoding="utf-8"))
TEXTS: list[str] = KNOWN["texts"]
REFERENCES: list[list[str]] = KNOWN["references"]
TABLES = KNOWN["tables"]
CONCEPTS = [["cat", "mats"], "x y", "hello", "cats dogs", "straße", "men riding", "drummer", "dog", "horses"]


def columns(needs):
    """What the metric needs beside texts, references and sources."""
    rows = len(TEXTS)
    every = {
        "table": TABLES,
        "concepts": CONCEPTS,
        "instruction_id_list": [["punctuation:no_comma"]] * rows,
        "kwargs": [[{}]] * rows,
    }
    return {need: every[need] for need in needs if need in every}
