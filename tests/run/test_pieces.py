"""Pieces of long tables: nothing is made twice, nothing is left out, and rows of other settings are not mixed in."""

from __future__ import annotations

import json

import pytest

from steersman.run.files import pieces
from steersman.run.files.pieces import Pieces
from steersman.run.progress import ProgressLine
from steersman.types import SteersmanError


class Maker:
    """Rows of items; `stop_at` is the item at which it dies."""

    def __init__(self, stop_at: int = 10**6) -> None:
        self.made: list[int] = []
        self.stop_at = stop_at

    def __call__(self, span, progress):
        for i, item in enumerate(span):
            if item == self.stop_at:
                raise KeyboardInterrupt
            self.made.append(item)
            progress(i + 1, len(span), 0)
        return [{"item": item, "half": half} for item in span for half in (0, 1)]


WHOLE = [{"item": item, "half": half} for item in range(10) for half in (0, 1)]


def test_what_is_kept_is_not_made_again_whatever_the_size_of_pieces(tmp_path):
    first = Pieces(tmp_path / "parts", 10, {"by": "a"})
    first.begin()
    with pytest.raises(KeyboardInterrupt):
        first.fill(4, Maker(stop_at=6), ProgressLine("rows"))
    again = Pieces(tmp_path / "parts", 10, {"by": "a"})
    assert again.changes() == []
    again.begin()
    assert again.missing(3) == [range(4, 7), range(7, 10)]
    maker = Maker()
    assert again.fill(3, maker, ProgressLine("rows")) == WHOLE
    assert maker.made == [4, 5, 6, 7, 8, 9]
    none = Maker()
    assert again.fill(5, none, ProgressLine("rows")) == WHOLE
    assert none.made == []
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_hole_between_pieces_is_filled(tmp_path):
    whole = Pieces(tmp_path / "parts", 10, {})
    whole.begin()
    whole.fill(3, Maker(), ProgressLine("rows"))
    (tmp_path / "parts/00000003-00000006.jsonl").unlink()
    (tmp_path / "parts/.tmp-00000003-00000006.jsonl").write_text("half of it")
    maker = Maker()
    assert whole.fill(2, maker, ProgressLine("rows")) == WHOLE
    assert maker.made == [3, 4, 5]


@pytest.mark.parametrize(
    ("count", "about", "said"),
    [
        (10, {"by": {"rate": 2.0}}, ["by.rate: 1.0 -> 2.0"]),
        (12, {"by": {"rate": 1.0}}, ["items: 10 -> 12"]),
    ],
)
def test_rows_of_other_settings_are_named_and_do_not_stay(count, about, said, tmp_path):
    before = Pieces(tmp_path / "parts", 10, {"by": {"rate": 1.0}})
    before.begin()
    before.fill(10, Maker(), ProgressLine("rows"))
    now = Pieces(tmp_path / "parts", count, about)
    assert now.changes() == said
    now.begin()
    assert now.missing(20) == [range(count)]
    (tmp_path / "parts/about.json").unlink()


def test_pieces_that_nobody_described_do_not_stay(tmp_path):
    before = Pieces(tmp_path / "parts", 10, {"by": "a"})
    before.begin()
    before.fill(10, Maker(), ProgressLine("rows"))
    (tmp_path / "parts/about.json").write_text("{")
    assert before.changes() == ["items: not there -> 10", "by: not there -> a"]
    before.begin()
    assert before.missing(10) == [range(10)]


def test_a_full_disk_leaves_what_was_kept(tmp_path, monkeypatch):
    kept = Pieces(tmp_path / "parts", 10, {})
    kept.begin()
    real, calls = pieces.write_atomic, []

    def full(path, data):
        calls.append(path)
        if len(calls) == 2:
            raise SteersmanError(f"{path}: the disk is full")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "write_atomic", full)
        with pytest.raises(SteersmanError, match="the disk is full"):
            kept.fill(4, Maker(), ProgressLine("rows"))
    maker = Maker()
    assert kept.fill(4, maker, ProgressLine("rows")) == WHOLE
    assert maker.made == [4, 5, 6, 7, 8, 9]


def test_the_time_left_is_that_of_what_is_still_to_be_made(tmp_path, monkeypatch):
    kept = Pieces(tmp_path / "parts", 10, {})
    kept.begin()
    with pytest.raises(KeyboardInterrupt):
        kept.fill(4, Maker(stop_at=4), ProgressLine("rows"))
    now, told = [0.0], []
    monkeypatch.setattr("steersman.run.progress.time.monotonic", lambda: now[0])

    def make(span, progress):
        for i in range(len(span)):
            now[0] += 6.0
            progress(i + 1, len(span), 0)
        return [{"item": item} for item in span]

    kept.fill(3, make, ProgressLine("rows", told.append))
    assert told[0] == "rows: 1 of 6, about 30 s left"
    assert told[-1] == "rows: 5 of 6, about 6 s left"


def test_rows_come_back_as_they_went(tmp_path):
    kept = Pieces(tmp_path / "parts", 1, {})
    kept.begin()
    rows = [{"text": "a\u2028b\nc \ud800 é", "none": None, "x": 0.1}]
    assert kept.fill(1, lambda span, progress: rows, ProgressLine("rows")) == rows
    assert json.loads((tmp_path / "parts/about.json").read_text()) == {"items": 1}
