"""Files as others leave them: a named error with file, line and field, or rows that are counted; nothing else."""

import gzip
import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from steersman.data import BadRows, DataConfig, demonstrations, preferences, read_rows
from steersman.types import SteersmanError

GOOD = '{"prompt": "d", "completion": "e"}\n'
LINES = {
    "half a pair": ('{"prompt": "a", "completion": "night \\ud83d"}', "lone surrogate", "field 'completion': a lone"),
    "in a turn": (
        '{"messages": [{"role": "user", "content": "night \\ude00."}]}',
        "lone surrogate",
        r"field 'messages\[0\].content': a lone surrogate",
    ),
    "deep": (
        '{"prompt": "a", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "nested too deeply",
        "nested too deeply",
    ),
    "huge": ('{"prompt": "a", "n": ' + "7" * 5000 + "}", "huge integer", "field 'n': an integer of more than 300"),
    "twice": ('{"prompt": "a", "completion": "good", "completion": "bad"}', "repeated key", "'completion': the key"),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", list(LINES))
def test_a_line_is_named_or_counted(tmp_path, name, suffix):
    line, reason, message = LINES[name]
    path = tmp_path / f"rows.{suffix}"
    path.write_text(f"{line}\n{GOOD}")
    with pytest.raises(SteersmanError, match=rf"rows.{suffix}, line 1.*{message[-30:]}"):
        list(read_rows(path))
    bad = BadRows("skip")
    if suffix == "json" and name == "deep":  # where a value that is too deep ends can not be told
        with pytest.raises(SteersmanError, match="nested too deeply"):
            list(read_rows(path, bad))
        return
    assert [row.data for row in read_rows(path, bad)] == [json.loads(GOOD)]
    assert bad.counts == {reason: 1}


@pytest.mark.parametrize("name", list(LINES))
def test_an_item_of_a_list_is_named_or_counted(tmp_path, name):
    line, reason, message = LINES[name]
    path = tmp_path / "rows.json"
    path.write_text(f"[{line}, {GOOD}]")
    with pytest.raises(SteersmanError, match=message):
        list(read_rows(path))
    if name != "deep":
        bad = BadRows("skip")
        assert [row.data for row in read_rows(path, bad)] == [json.loads(GOOD)]
        assert bad.counts == {reason: 1}


def test_one_object_over_several_lines(tmp_path):
    body = '{\n "prompt": "a",\n "completion": "b"\n}\n{\n "prompt": "c",\n "completion": "d"\n}\n'
    (tmp_path / "pretty.jsonl").write_text(body)
    with pytest.raises(SteersmanError, match=r"line 1: .*one object over several lines is a .json file"):
        list(read_rows(tmp_path / "pretty.jsonl"))
    (tmp_path / "pretty.json").write_text(body)
    rows = list(read_rows(tmp_path / "pretty.json"))
    assert [(row.number, row.data["prompt"]) for row in rows] == [(1, "a"), (5, "c")]


def test_many_objects_over_several_lines_are_read_soon(tmp_path):
    """In time linear in the file: 40,000 of them took a minute of work while each looked at the rest of the file."""
    path = tmp_path / "rows.json"
    path.write_text('{\n  "text": "once upon a time there was a file of many objects"\n}\n' * 40_000)
    start = time.process_time()
    found = list(read_rows(path))
    assert time.process_time() - start < 10
    assert len(found) == 40_000
    assert found[-1].number == 3 * 39_999 + 1


def test_messages_as_text(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": json.dumps(talk)}))
    with pytest.raises(SteersmanError, match=r"'messages' holds JSON as text: data.json_columns: \[messages\]"):
        demonstrations(DataConfig(path=str(path)))
    loaded = demonstrations(DataConfig(path=str(path), json_columns=["messages"]))
    assert loaded.train[0].completion == talk[1:]
    path.write_text(json.dumps({"messages": "[{"}))
    with pytest.raises(SteersmanError, match="field 'messages': the field does not hold whole JSON"):
        demonstrations(DataConfig(path=str(path), json_columns=["messages"]))
    path.write_text(json.dumps({"messages": "[" * 100_000}))
    with pytest.raises(SteersmanError, match="field 'messages': nested too deeply"):
        demonstrations(DataConfig(path=str(path), json_columns=["messages"]))


TEXTS = {
    "gbk": ("gb18030", "你好，请介绍一下北京的天气情况"),
    "big5": ("big5", "你好，請介紹一下台北的天氣情況"),
    "latin-1": ("cp1252", "une crème brûlée à Besançon où il mange du pâté"),
    "cp1251": ("cp1251", "Привет, расскажи о погоде в Москве"),
    "shift_jis": ("shift_jis", "東京の天気を教えてください"),
    "utf-16": ("utf-16", "héllo wörld"),
    "utf-16-le": ("utf-16-le", "hello world and more"),
}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "txt"])
@pytest.mark.parametrize("name", list(TEXTS))
def test_another_encoding_is_recognised_and_read(tmp_path, name, suffix):
    told, text = TEXTS[name]
    row = {"prompt": text, "completion": text}
    one = json.dumps(row, ensure_ascii=False)
    table = f'prompt,completion\n"{text}","{text}"\n'
    body = {"csv": table, "jsonl": one + "\n", "json": f"[{one}]", "txt": text}[suffix]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(body.encode(name))
    with pytest.raises(SteersmanError, match=rf"a.{suffix}.*looks like {told}[ ,].*data.encoding: {told} "):
        demonstrations(DataConfig(path=str(path)))
    with pytest.raises(SteersmanError, match="save the file as UTF-8") as caught:  # where no key names an encoding
        list(read_rows(path))
    assert "data.encoding" not in str(caught.value)
    loaded = demonstrations(DataConfig(path=str(path), encoding=told))
    assert text in (loaded.train[0].prompt, loaded.train[0].completion)


def test_an_encoding_that_does_not_fit(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xff\xff")
    with pytest.raises(SteersmanError, match=r"a.txt, line 2: .*data.encoding names, gb18030"):
        list(read_rows(tmp_path / "a.txt", encoding="gb18030", encoding_key="data.encoding"))
    for name in ("klingon", "hex"):
        with pytest.raises(ValidationError, match="is no encoding that is known"):
            DataConfig(path="a", encoding=name)


def test_nulls_that_the_container_made_are_dropped_and_counted(tmp_path):
    def call(name, **arguments):
        return [{"function": {"name": name, "arguments": arguments}}]

    talk = [
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": call("weather", city="Oslo")}]},
        {"messages": [{"role": "assistant", "content": "b", "tool_calls": call("time", zone="UTC")}]},
    ]
    pq.write_table(pa.Table.from_pylist(talk), tmp_path / "a.parquet")
    bad = BadRows()
    assert [row.data for row in read_rows(tmp_path / "a.parquet", bad)] == talk
    assert bad.nulls == 2
    # in JSON a null was written by someone
    (tmp_path / "a.json").write_text(json.dumps([{"messages": [{"tool_calls": call("weather", city=None)}]}]))
    (row,) = read_rows(tmp_path / "a.json", bad)
    assert row.data["messages"][0]["tool_calls"][0]["function"]["arguments"] == {"city": None}


def test_a_map_of_parquet_is_an_object(tmp_path):
    kind = pa.list_(pa.struct([("role", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))]))
    table = pa.table({"messages": pa.array([[{"role": "tool", "arguments": [("city", "Oslo")]}]], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet")
    assert row.data == {"messages": [{"role": "tool", "arguments": {"city": "Oslo"}}]}


def test_text_in_parquet_that_is_not_utf8(tmp_path):
    odd = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0\x08\0\0\0"), pa.py_buffer(b"finecaf\xe9")]
    )
    pq.write_table(pa.table({"n": pa.array([1, 2]), "text": odd}), tmp_path / "a.parquet")
    with pytest.raises(SteersmanError, match="row 2, field 'text': the value can not be read"):
        list(read_rows(tmp_path / "a.parquet"))
    bad = BadRows("skip")
    assert [row.data["text"] for row in read_rows(tmp_path / "a.parquet", bad)] == ["fine"]
    assert bad.counts == {"unreadable value": 1}


PIECES = st.sampled_from(
    [b'{"', b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\r\n", b"\t", b"\0", b"\\ud83d", b"\\u0000", b"messages",
     b"role", b"content", b"user", b"assistant", b"prompt", b"completion", b"null", b"1e999", b"-" + b"9" * 4500,
     b"[" * 1500, b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", "你".encode("gbk"), b"NaN", b"PAR1", b"<|endoftext|>"]
)  # fmt: skip
FILES = st.binary(max_size=200) | st.lists(PIECES | st.binary(max_size=3), max_size=30).map(b"".join)


@given(
    content=FILES,
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz"]),
    policy=st.sampled_from(["stop", "skip"]),
    encoding=st.sampled_from([None, "utf-16", "gb18030", "utf-7", "unicode_escape", "punycode"]),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_rows_or_a_named_error(tmp_path, content, suffix, policy, encoding):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    began = time.process_time()
    try:
        for row in read_rows(path, BadRows(policy), encoding=encoding):
            json.dumps(row.data, default=str).encode()
        demonstrations(DataConfig(path=str(path), on_bad_row=policy, encoding=encoding))
    except SteersmanError:
        pass
    assert time.process_time() - began < 3


def test_blanks_in_a_debate_take_time_that_grows_with_their_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"#id": "1", "label": "a2", "a1": "b", "a2": "a<br/> c <br>d" + " " * 40_000 + "e"}))
    start = time.process_time()
    (pair,) = preferences(DataConfig(path=str(path))).train
    assert pair.chosen == "a\nc\nd" + " " * 40_000 + "e"
    assert time.process_time() - start < 3


@pytest.mark.parametrize("before", [0, 2, 4000])
def test_a_line_that_is_too_long_is_named_before_it_is_all_read(tmp_path, before):
    """A few KB that are packed may hold a line of any size."""
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(GOOD.encode() * before + b'{"prompt": "' + b"a" * (70 << 20))
    with pytest.raises(SteersmanError, match=rf"rows\.jsonl\.gz, line {before + 1}: more than 64 MiB on one line"):
        list(read_rows(path))


@pytest.mark.parametrize("size", [10, 3000, 70_000, 200_000])
@pytest.mark.parametrize("last", ["", "\n"])
def test_every_line_is_read_whatever_its_length(tmp_path, size, last):
    rows = [{"prompt": f"{i}", "completion": "a" * (size + i)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + last)
    assert [(row.data, row.number) for row in read_rows(tmp_path / "rows.jsonl")] == list(
        zip(rows, range(1, 7), strict=True)
    )
