"""Pairs with a gold answer: what rows become, how they are kept, and which rows are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from letter_models import letters, write_jsonl

from steersman.data import DataConfig, LargeDataConfig, Order, layout, preferences, training
from steersman.data.load import triples
from steersman.types import SteersmanError

ROW = {"prompt": "ask", "chosen": "yes", "rejected": "no", "gold": "yes, it is"}
TURNS = [{"role": "user", "content": "ask"}]
CHAT = {
    "chosen": [*TURNS, {"role": "assistant", "content": "yes"}],
    "rejected": [*TURNS, {"role": "assistant", "content": "no"}],
    "gold": [{"role": "assistant", "content": "yes, it is"}],
}


def section(folder: Path, rows: list[dict[str, Any]], **more: Any) -> DataConfig:
    return DataConfig.model_validate({"path": str(write_jsonl(folder / "rows.jsonl", rows)), **more})


def test_a_gold_answer_is_read_where_it_is_asked_for(tmp_path):
    config = section(tmp_path, [ROW], completion_prefix=" ")
    (found,), (pair,) = triples(config).train, preferences(config).train
    assert (found.chosen, found.rejected, found.gold) == (" yes", " no", " yes, it is")
    assert pair.gold is None
    assert "with a gold answer" in triples(config).shape.sentence


def test_text_and_turns_become_one_form(tmp_path):
    (found,) = triples(section(tmp_path, [CHAT])).train
    assert (found.prompt, found.gold) == (TURNS, CHAT["gold"])
    (mixed,) = triples(section(tmp_path, [{**ROW, "prompt": TURNS}])).train
    assert mixed.gold == [{"role": "assistant", "content": "yes, it is"}]
    (named,) = triples(section(tmp_path, [{**ROW, "gold": None, "best": "so"}], columns={"gold": "best"})).train
    assert named.gold == "so"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {k: v for k, v in ROW.items() if k != "gold"},
            r"pairs.*need prompt, chosen, rejected and gold.*data\.columns",
        ),
        ({**ROW, "gold": "  "}, "field 'gold': the answer is empty"),
        ({**ROW, "gold": 3}, "field 'gold': must be text or a list of turns"),
        ({**CHAT, "gold": [*TURNS, *CHAT["gold"]]}, "field 'gold': give the reply alone"),
    ],
)
def test_rows_without_a_gold_answer_are_named(tmp_path, row, words):
    with pytest.raises(SteersmanError, match=words):
        triples(section(tmp_path, [row]))


def test_one_row_that_lacks_it_is_a_bad_row(tmp_path):
    rows = [ROW, {**ROW, "prompt": "b", "gold": None}]
    with pytest.raises(SteersmanError, match="line 2, field 'gold': the field is null"):
        triples(section(tmp_path, rows))
    assert len(triples(section(tmp_path, rows, on_bad_row="skip")).train) == 1


@pytest.mark.parametrize("how", ["memory", "cache", "stream"])
def test_groups_have_three_answers_however_they_are_read(tmp_path, how):
    rows = [{**ROW, "prompt": f"ask {i}"} for i in range(4)]
    more = {"cache": {"cache": str(tmp_path / "cache")}, "stream": {"stream": True}}.get(how, {})
    config = LargeDataConfig.model_validate({"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), **more})
    laid = layout(letters(), config)
    data = training(config, "triple", laid, context=None, order=Order(2, 0))
    batch = next(data.stream.forever()) if data.stream is not None else range(4)
    for i in batch:
        texts = [laid.codec.decode(e.response, after=False).strip() for e in data.train.groups[i]]
        assert [text.removesuffix("<eos>") for text in texts] == ["yes", "no", "yes, it is"]
