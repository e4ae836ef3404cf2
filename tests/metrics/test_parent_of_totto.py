"""PARENT by ToTTo's program: two tables, a weight that the reference says, its tokens and its "<null>"."""

from __future__ import annotations

import pytest

from steersman.grue.tasks.table_to_text import page
from steersman.metrics import metric
from steersman.metrics.workers import Parallel
from steersman.types import SteersmanError

ONE = ["Alpha Dawn was released in 2009 on the Xbox 360 with sales of 2,000,000-2 m copies."]
THREE = [*ONE, "In 2009, Alpha Dawn came out.", "Alpha Dawn (2009) sold 2 m copies."]
TEXTS = [
    "Alpha Dawn was released in 2009.",
    "Alpha Dawn sold 2,000,000 copies for Xbox 360 in 2009.",
    "In 2009 Alpha Dawn, on the platform Xbox 360, had sales of 2,000,000-2 m.",
    "Huge Games releases 2009 Alpha Dawn.",
    "",
]
# By a transcription of get_parent_tables, get_references and parent (google-research/language, totto), with
# sacrebleu's 13a: references filled up to three with "<null>", the same without those, and three true references.
WITH_NULL = [0.460756484, 0.592715227, 0.646080893, 0.846153841, 0.000019996]
WITHOUT = [0.383016584, 0.024814929, 0.611868683, 0.021463093, 0.0]
OF_THREE = [0.383016584, 0.081910640, 0.611868683, 0.095039774, 0.0]


def row(references):
    def cell(value, header=False):
        return {"value": value, "is_header": header, "column_span": 1, "row_span": 1}

    head = [cell(name, True) for name in ("Year", "Title", "Platform", "Sales")]
    first = [cell(value) for value in ("2009", "Alpha Dawn", "Xbox 360", "2,000,000|2 m")]
    second = [cell(value) for value in ("2011", "Beta Dusk", "", "one million copies")]
    (made,) = page(
        {
            "table_page_title": "Huge Games",
            "table_section_title": "Releases | 2009",
            "table_section_text": "Figures by G. Gamer.",
            "table": [head, first, second],
            "highlighted_cells": [[1, 0], [1, 1], [1, 3]],
            "sentence_annotations": [{"final_sentence": text} for text in references],
        }
    )
    return made


@pytest.mark.parametrize(
    ("references", "settings", "expected"),
    [(ONE, {}, WITH_NULL), (ONE, {"null_reference": False}, WITHOUT), (THREE, {}, OF_THREE)],
)
def test_it_equals_the_program_of_totto(references, settings, expected):
    made, n = row(references), len(TEXTS)
    found = metric("parent", {"program": "totto", **settings}).score(
        TEXTS, [made["references"]] * n, table=[made["table"]] * n, precision_table=[made["precision_table"]] * n
    )
    assert found == pytest.approx(expected, abs=1e-8)


def test_settings_stand_in_the_place_of_the_program_s_own():
    made = row(ONE)
    given = {"table": [made["table"]], "precision_table": [made["precision_table"]]}
    half = metric("parent", {"program": "totto", "lam": 0.5}).score(TEXTS[:1], [ONE], **given)
    whole = metric("parent", {"program": "totto", "lam": 1.0}).score(TEXTS[:1], [ONE], **given)
    assert whole[0] != pytest.approx(half[0], abs=1e-3)
    plain = metric("parent").score(TEXTS[:1], [ONE], table=[made["table"]])
    assert plain == metric("parent", {"lam": 0.5, "tokens": "words"}).score(TEXTS[:1], [ONE], table=[made["table"]])
    assert metric("parent").needs == ("references", "table")
    with pytest.raises(SteersmanError, match="belongs to program: totto"):
        metric("parent", {"null_reference": False})


def test_a_bad_second_table_is_named_before_and_while_scoring():
    made = metric("parent", {"program": "totto"})
    assert made.wrong_with("precision_table", []) == (
        "the precision table is empty; give a list of [attribute, value] or of [head, relation, tail]"
    )
    assert made.wrong_with("precision_table", [["a", " "]]) == "the precision table's values have no words"
    assert made.wrong_with("table", [["a", "b"]]) == ""
    assert "is missing" in Parallel("parent", {"program": "totto"}).wrong_with("precision_table", None)
    with pytest.raises(SteersmanError, match="row 0: the precision table is missing"):
        made.score(["a"], ["a"], table=[[["a", "b"]]], precision_table=[None])
