"""Files, folders and hub sets -> rows that know where they came from.

Local paths come first; only a name that is no local path is looked up on the hub.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steersman.types import SteersmanError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
STORY_END = "<|endoftext|>"


class RowError(SteersmanError):
    """One row that can not be used; `reason` is the short name under which skipped rows are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True)
class BadRows:
    """What to do with a bad row: stop at once, or skip it and keep count by reason.

    `counts` says how many rows were skipped for each reason, `first` holds the first message of each.
    """

    policy: Literal["stop", "skip"] = "stop"
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, bad: RowError) -> None:
        if self.policy == "stop":
            raise RowError(bad.reason, f"{bad} (data.on_bad_row: skip leaves such rows out and counts them)") from bad
        self.note(bad.reason, str(bad))

    def note(self, reason: str, message: str) -> None:
        """Count a row that is left out because the recipe says so."""
        self.counts[reason] += 1
        self.first.setdefault(reason, message)

    @property
    def sentence(self) -> str:
        if not self.counts:
            return "no row left out"
        parts = ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())
        return f"{self.counts.total()} rows left out: {parts}"


@dataclass(slots=True)
class Row:
    """One row of data: `number` counts lines (JSONL, CSV, text) or rows (JSON, Parquet, hub) from 1.

    `names` maps a canonical column to the user's own name for it, so that errors speak the user's language.
    """

    data: dict[str, Any]
    file: str
    number: int
    unit: str = "row"
    names: dict[str, str] = field(default_factory=dict)

    def where(self, column: str | None = None) -> str:
        place = f"{self.file}, {self.unit} {self.number}"
        return place if column is None else f"{place}, field {self.names.get(column, column)!r}"

    def fault(self, reason: str, message: str, column: str | None = None) -> RowError:
        return RowError(reason, f"{self.where(column)}: {message}")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or nothing."""
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.6)
    return f"; did you mean {lower[close[0]]!r}?" if close else ""


def read_rows(
    source: str | Path | Iterable[str | Path],
    bad: BadRows | None = None,
    *,
    text_split: str = "auto",
    subset: str | None = None,
    hub_split: str = "train",
) -> Iterator[Row]:
    """The rows of a file, a folder, a glob, a list of these, or a hub data set, in a stable order.

    `text_split` says how plain text is cut into rows: "lines", "blank" (at blank lines), a separator line
    such as `<|endoftext|>`, or "auto" (that separator if it occurs, else blank lines, else lines).

    Raises SteersmanError for a path that does not exist, an empty or unreadable file, and, unless `bad` says
    to skip, at the first row that is broken or no object.
    """
    bad = bad or BadRows()
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise SteersmanError("data.path is an empty list: name a file, a folder, a glob or a hub data set")
    for one in sources:
        paths = local_files(one)
        if paths is None:
            yield from _hub(str(one), subset, hub_split)
        for path in paths or []:
            yield from _file(path, bad, text_split)


def local_files(source: str | Path) -> list[Path] | None:
    """The data files that a local path, folder or glob stands for, sorted; None where it names a hub set."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) is not None)
        if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            return None
        # a README.txt beside the data is no data; text files count where there is nothing else
        found = [p for p in found if _kind(p) != ".txt"] or found
        if not found:
            raise SteersmanError(f"{path}: no data file in this folder (looked for {', '.join(SUFFIXES)}, .gz too)")
        return found
    if path.exists():
        return [path]
    if any(c in str(source) for c in "*?["):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise SteersmanError(f"{source}: no file matches this pattern")
        return found
    looks_local = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if looks_local or _kind(path) is not None:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SteersmanError(f"{source}: no such file or folder{nearest(path.name, siblings)}")
    return None


def _kind(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def _file(path: Path, bad: BadRows, text_split: str) -> Iterator[Row]:
    kind = _kind(path)
    if kind is None:
        raise SteersmanError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}, each also as .gz")
    content = _bytes(path)
    if not content.strip():
        raise SteersmanError(f"{path}: the file is empty")
    name, count = str(path), 0
    if kind in (".jsonl", ".ndjson"):
        rows = _jsonl(content, name, bad)
    elif kind == ".json":
        rows = _json(content, name, bad)
    elif kind == ".parquet":
        rows = _parquet(content, name)
    elif kind == ".txt":
        rows = _text(_decode(content, name), name, text_split)
    else:
        rows = _csv(_decode(content, name), name, kind, bad)
    for row in rows:
        count += 1
        yield row
    if count == 0 and not bad.counts:
        raise SteersmanError(f"{path}: the file holds no rows")


def _bytes(path: Path) -> bytes:
    try:
        if path.suffix.lower() != ".gz":
            return path.read_bytes()
        with gzip.open(path) as stream:
            return stream.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SteersmanError(f"{path}: not a whole gzip file ({error}); copy or download it again") from error
    except OSError as error:
        raise SteersmanError(f"{path}: can not be read ({error.strerror or error})") from error


def _decode(content: bytes, file: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SteersmanError(
            f"{file}, line {line}: byte {content[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from error


def _jsonl(content: bytes, file: str, bad: BadRows) -> Iterator[Row]:
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        row = Row({}, file, number, "line")
        try:
            data = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad.add(row.fault("undecodable bytes", f"byte {raw[error.start]:#04x} is not UTF-8"))
        except json.JSONDecodeError as error:
            bad.add(row.fault("broken JSON", f"not a whole JSON object ({error.msg}); was the file cut short?"))
        else:
            if isinstance(data, dict):
                row.data = data
                yield row
            else:
                bad.add(row.fault("not an object", f"a {type(data).__name__}, but every line must be an object"))


def _json(content: bytes, file: str, bad: BadRows) -> Iterator[Row]:
    text = _decode(content, file)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line under the name .json
            yield from _jsonl(content, file, bad)
            return
        raise SteersmanError(
            f"{file}, line {error.lineno}: not whole JSON ({error.msg}); was the file cut short?"
        ) from error
    if isinstance(data, dict):
        lists = [data[k] for k in ("examples", "data", "rows", "train") if isinstance(data.get(k), list)]
        data = lists[0] if lists else [data]
    if not isinstance(data, list):
        raise SteersmanError(f"{file}: a {type(data).__name__}; expected a list of objects")
    for number, item in enumerate(data, 1):
        row = Row({}, file, number)
        if isinstance(item, dict):
            row.data = item
            yield row
        else:
            bad.add(row.fault("not an object", f"a {type(item).__name__}, but every row must be an object"))


def _csv(text: str, file: str, kind: str, bad: BadRows) -> Iterator[Row]:
    head = text.split("\n", 1)[0]
    delimiter = "\t" if kind == ".tsv" else next((d for d in "\t,;" if d in head), ",")
    # tab-separated files do not quote: a lone quotation mark in one would swallow the lines after it
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    csv.field_size_limit(2**31 - 1)
    lines = (line + "\n" for line in text.replace("\r\n", "\n").split("\n"))
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    begins = 1  # the line on which the next record begins
    try:
        header = [name.strip() for name in next(reader)]
        begins = reader.line_num + 1
        repeated = [name for name, n in Counter(header).items() if n > 1]
        if repeated:
            raise SteersmanError(f"{file}, line 1: column {repeated[0]!r} occurs twice in the header")
        for values in reader:
            begins = reader.line_num + 1
            row = Row({}, file, reader.line_num, "line")
            if len(values) == len(header):
                row.data = dict(zip(header, values, strict=True))
                yield row
            elif values:
                bad.add(row.fault("wrong number of fields", f"{len(values)} fields, the header has {len(header)}"))
    except csv.Error as error:
        raise SteersmanError(f"{file}, line {begins}: {error}; is a quotation mark left open?") from error


def _parquet(content: bytes, file: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise SteersmanError(f"{file}: not a whole Parquet file ({error})") from error
    number = 0
    for batch in table.to_batches(1024):
        for data in batch.to_pylist():
            number += 1
            yield Row(data, file, number)


def _text(text: str, file: str, split: str) -> Iterator[Row]:
    lines = text.replace("\r\n", "\n").split("\n")
    if split == "auto":
        blank_inside = any(not line.strip() for line in "\n".join(lines).strip().split("\n"))
        split = STORY_END if STORY_END in lines else "blank" if blank_inside else "lines"
    piece: list[str] = []
    for number, line in enumerate([*lines, None], 1):
        ends = line is None or split == "lines" or (not line.strip() if split == "blank" else line.strip() == split)
        if line is not None and (split == "lines" or not ends):
            piece.append(line)
        if ends:
            body = "\n".join(piece)
            first = number - len(piece) + (split == "lines" and line is not None)
            if body.strip():
                yield Row({"text": body.strip("\n")}, file, first, "line")
            piece = []


def _hub(name: str, subset: str | None, split: str) -> Iterator[Row]:
    import datasets

    try:
        if Path(name).is_dir():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library and its network layers raise many kinds
        raise SteersmanError(
            f"{name}: neither a local file nor a data set that could be loaded from the hub (split {split!r}): "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Without network, give a "
            "local path or fetch the set beforehand."
        ) from error
    for number, data_row in enumerate(data, 1):
        yield Row(dict(data_row), name, number)
