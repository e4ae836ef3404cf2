"""Files of JSON Lines: any text comes back as it was, cut lines cost themselves alone, and readers name the place."""

from __future__ import annotations

import json
import threading

import pytest

from steersman.jsonl import append_jsonl, jsonl_text, parse_jsonl, read_jsonl
from steersman.types import SteersmanError

BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
"""Every character at which `str.splitlines` breaks."""
ROWS = [{"text": f"before{mark}after"} for mark in BREAKS]


def test_texts_with_any_line_break_come_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl_text(ROWS), encoding="utf-8")
    assert read_jsonl(path) == ROWS
    assert [row for _, row in parse_jsonl(path)] == ROWS
    for row in ROWS:
        append_jsonl(path, row)
    assert read_jsonl(path) == [*ROWS, *ROWS]
    assert [place for place, _ in parse_jsonl(path)][-1] == f"{path}, line {2 * len(ROWS)}"


def test_a_line_that_a_kill_cut_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"a": 2, "tex')
    assert read_jsonl(path) == [{"a": 1}]
    append_jsonl(path, {"a": 3, "half": "\ud800"})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3, "half": "\ud800"}]
    with pytest.raises(SteersmanError, match=r"rows\.jsonl, line 2: no JSON"):
        list(parse_jsonl(path))


def test_threads_that_share_a_file_lose_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"

    def write(who):
        for i in range(20):
            append_jsonl(path, {"who": who, "i": i, "text": "x" * 20_000})

    threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(json.loads(line)["who"], json.loads(line)["i"]) for line in path.read_text().split("\n") if line]
    assert sorted(found) == [(who, i) for who in range(4) for i in range(20)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"a": "\xff"}', "line 2: byte 0xff is not UTF-8"),
        (b'{"a": "\\ud800"}', "line 2, field 'a': a lone surrogate"),
        (b'{"a": 1, "a": 2}', "line 2.*'a'"),
        (b"[" * 300 + b"]" * 300, "line 2.*200"),
        (b"a", "line 2: no JSON"),
    ],
)
def test_what_is_no_row_is_named_by_its_place(tmp_path, line, told):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n' + line + b"\n")
    with pytest.raises(SteersmanError, match=rf"rows\.jsonl, {told}"):
        list(parse_jsonl(path))
    with pytest.raises(SteersmanError, match=r"none\.jsonl: can not be read"):
        list(parse_jsonl(tmp_path / "none.jsonl"))
