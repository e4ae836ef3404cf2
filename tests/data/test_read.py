import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steersman.data import BadRows, read_rows
from steersman.types import SteersmanError

ROWS = [{"prompt": "a", "completion": 'é, "b"\nc'}, {"prompt": "d", "completion": "e"}]


def write(path, content: str | bytes):
    content = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


def contents(rows) -> dict[str, str]:
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), table)
    quoted = "".join('"{}","{}"\n'.format(*(v.replace('"', '""') for v in r.values())) for r in rows)
    return {
        "rows.jsonl": "".join(json.dumps(r) + "\n" for r in rows),
        "rows.json": json.dumps(rows, indent=1),
        "lines.json": "\n".join(json.dumps(r) for r in rows),
        "nested.json": json.dumps({"canary": 1, "examples": rows}),
        "rows.csv": "\ufeffprompt,completion\r\n" + quoted.replace("\n", "\r\n").replace("\r\nc", "\nc"),
        "rows.parquet": table.getvalue().to_pybytes(),
    }


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("name", list(contents(ROWS)))
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, zipped):
    path = write(tmp_path / (name + zipped), contents(ROWS)[name])
    rows = list(read_rows(path))
    assert [r.data for r in rows] == ROWS
    assert all(r.file == str(path) for r in rows)


def test_rows_know_their_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert [r.where("a") for r in read_rows(path)] == [f"{path}, line {n}, field 'a'" for n in (1, 3)]
    path = write(tmp_path / "a.json", '[{"a": 1}, {"a": 2}]')
    assert [r.where() for r in read_rows(path)] == [f"{path}, row {n}" for n in (1, 2)]


def test_tab_separated_fields_are_not_quoted(tmp_path):
    body = '#id\tlabel\ta1\n1\ta1\the said "no\n2\ta2\tyes\n'
    for name in ("a.tsv", "a.csv"):
        rows = [r.data["a1"] for r in read_rows(write(tmp_path / name, body))]
        assert rows == ['he said "no', "yes"]


@pytest.mark.parametrize(
    ("split", "body", "expected"),
    [
        ("auto", "one\ntwo\n<|endoftext|>\nthree\n\nfour\n<|endoftext|>\n", [(1, "one\ntwo"), (4, "three\n\nfour")]),
        ("auto", "one\ntwo\n\n\nthree\n", [(1, "one\ntwo"), (5, "three")]),
        ("auto", "one\ntwo\n", [(1, "one"), (2, "two")]),
        ("lines", "one\n\ntwo", [(1, "one"), (3, "two")]),
        ("###", "one\n\n###\ntwo", [(1, "one"), (4, "two")]),
    ],
)
def test_text_is_cut_into_rows(tmp_path, split, body, expected):
    rows = read_rows(write(tmp_path / "a.txt", body), text_split=split)
    assert [(r.number, r.data["text"]) for r in rows] == expected


def test_folders_globs_and_lists_in_a_stable_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.jsonl", "LICENSE", "README.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, json.dumps({"n": name}))
    assert [r.data["n"] for r in read_rows(tmp_path)] == ["a.jsonl.gz", "b.jsonl", "sub/c.jsonl"]
    assert [r.data["n"] for r in read_rows(str(tmp_path / "*.jsonl"))] == ["b.jsonl"]
    both = [tmp_path / "sub", tmp_path / "b.jsonl"]
    assert [r.data["n"] for r in read_rows(both)] == ["sub/c.jsonl", "b.jsonl"]


def test_hidden_files_of_a_folder_are_no_data(tmp_path):
    folder = tmp_path / ".kept" / "data"
    names = ["rows.jsonl", "sub/more.jsonl", ".ipynb_checkpoints/rows.jsonl", ".tmp-rows.jsonl", "sub/.old/x/y.jsonl"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, json.dumps({"n": name}))
    assert [r.data["n"] for r in read_rows(folder)] == ["rows.jsonl", "sub/more.jsonl"]
    assert [r.data["n"] for r in read_rows(folder / ".tmp-rows.jsonl")] == [".tmp-rows.jsonl"]
    (tmp_path / "other" / ".git").mkdir(parents=True)
    write(tmp_path / "other" / ".git" / "rows.jsonl", "{}")
    with pytest.raises(SteersmanError, match=r"no data file in this folder.*hidden files are left out"):
        list(read_rows(tmp_path / "other"))


def test_a_folder_that_datasets_saved(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert [r.data for r in read_rows(tmp_path / "saved")] == ROWS


FATAL = {
    "empty.jsonl": (b"", r"empty.jsonl: the file is empty"),
    "blank.csv": (b"\n \n", r"the file is empty"),
    "header.csv": (b"a,b\n", r"holds no rows"),
    "none.json": (b"[]", r"holds no rows"),
    "cut.json": (b'[{"a": 1},\n{"a": ', r"cut.json, line 2: not whole JSON.*cut short"),
    "number.json": (b"3", r"number.json: a int; expected a list"),
    "latin.csv": ("a,b\n1,é\n".encode("latin-1"), r"latin.csv, line 2: byte 0xe9 is not UTF-8"),
    "latin.txt": ("caf\xe9".encode("latin-1"), r"latin.txt, line 1: byte 0xe9"),
    "twice.csv": (b"a,a\n1,2\n", r"line 1: column 'a' occurs twice"),
    "open.csv": (b'a,b\n1,"two\n3,4\n', r"open.csv, line 2.*quotation mark left open"),
    "cut.parquet": (b"PAR1 no", r"cut.parquet: not a whole Parquet file"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 500)[:-12], r"not a whole gzip file"),
    "no.jsonl.gz": (b'{"a": 1}\n', r"not a whole gzip file"),
    "odd.xlsx": (b"PK", r"unknown kind of file"),
}


@pytest.mark.parametrize("name", list(FATAL))
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_file_that_can_not_be_read_is_named(tmp_path, name, policy):
    (tmp_path / name).write_bytes(FATAL[name][0])
    with pytest.raises(SteersmanError, match=FATAL[name][1]):
        list(read_rows(tmp_path / name, BadRows(policy)))


BAD = {
    "cut.jsonl": (b'{"a": 1}\n{"a": 2}\n{"a": ', "broken JSON", r"cut.jsonl, line 3: not a whole JSON object"),
    "table.jsonl": (b'{"a": 1}\n{"a": 2}\na,b\n', "broken JSON", r"line 3: no JSON object.*a table ends in .csv"),
    "list.jsonl": (b'{"a": 1}\n{"a": 2}\n[1]\n', "not an object", r"line 3: a list, but every line"),
    "list.json": (b'[{"a": 1}, {"a": 2}, "x"]', "not an object", r"row 3: a str, but every row"),
    "latin.jsonl": (b'{"a": 1}\n{"a": 2}\n{"a": "\xe9"}\n', "undecodable bytes", r"line 3: byte 0xe9"),
    "ragged.csv": (b"a,b\n1,2\n3,4\n5\n", "wrong number of fields", r"line 4: 1 fields, the header has 2"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_row_stops_or_is_skipped_and_counted(tmp_path, name):
    body, reason, message = BAD[name]
    (tmp_path / name).write_bytes(body)
    with pytest.raises(SteersmanError, match=message) as caught:
        list(read_rows(tmp_path / name))
    assert "on_bad_row" not in str(caught.value)  # nobody said that a recipe has such a key
    with pytest.raises(SteersmanError, match=rf"{message}.*\(a\.key: skip"):
        list(read_rows(tmp_path / name, BadRows(key="a.key")))
    bad = BadRows("skip")
    assert len(list(read_rows(tmp_path / name, bad))) == 2
    assert bad.counts == {reason: 1}
    assert bad.sentence == f"1 rows left out: 1 {reason}"


def test_a_path_that_is_not_there(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(SteersmanError, match=r"no such file or folder; did you mean 'train.jsonl'\?"):
        list(read_rows(tmp_path / "tran.jsonl"))
    with pytest.raises(SteersmanError, match="no file matches"):
        list(read_rows(str(tmp_path / "*.csv")))
    (tmp_path / "bare").mkdir()
    with pytest.raises(SteersmanError, match="no data file in this folder"):
        list(read_rows(tmp_path / "bare"))
    with pytest.raises(SteersmanError, match="empty list"):
        list(read_rows([]))
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "bare" / name).write_text("{}\n")
    with pytest.raises(SteersmanError, match="this is a run's folder, not data; name the file in it"):
        list(read_rows(tmp_path / "bare"))
    (tmp_path / "bare/samples.jsonl").write_text('{"completion": "a"}\n')
    with pytest.raises(SteersmanError, match=r"name samples\.jsonl, its held-out answers"):
        list(read_rows(tmp_path / "bare"))


def test_a_hub_name_without_network(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SteersmanError, match=r"someone/some-set-that-is-not: neither a local file nor.*network"):
        list(read_rows("someone/some-set-that-is-not"))
