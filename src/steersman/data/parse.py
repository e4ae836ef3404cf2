"""The text or bytes of one file -> rows, for each kind of file."""

from __future__ import annotations

import csv
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from steersman.data.encoding import decode, is_wide, not_utf8
from steersman.data.rows import BadRows, Row
from steersman.guards.untrusted import Parsed, UntrustedError, first_fault, parse_json, parse_suspect
from steersman.types import SteersmanError

HEAD = 2**16
"""Bytes of a file of lines by which its encoding is judged."""
LONGEST_LINE = 64 << 20
"""Bytes of one line, unpacked: a small file that is packed may hold a line that no memory has room for."""
_INK = re.compile(r"\S")
STORY_END = "<|endoftext|>"
TOOL_FIELDS = ("tool_calls", "tools", "arguments", "function_call")
"""Fields inside which a null that the container invented would be shown to the model."""


def jsonl(stream: BinaryIO, file: str, bad: BadRows, key: str | None = None) -> Iterator[Row]:
    """One object a line, read line by line. A line that is none is a bad row. `key` is the recipe's key that names an
    encoding. Raises SteersmanError for a line of more than LONGEST_LINE bytes."""
    head = stream.read(HEAD)
    if is_wide(head):
        decode(head, file, key=key)  # which says what to do
    advice = functools.cache(lambda: not_utf8(head, key))
    lines = enumerate(_lines(head, stream, file), 1)
    filled: Iterator[tuple[int, bytes]] = ((number, raw) for number, raw in lines if raw.strip())
    for number, raw in filled:
        row = Row({}, file, number, "line")
        try:
            data = parse_json(raw.decode("utf-8"), file)
        except UnicodeDecodeError as error:
            bad.add(row.fault("undecodable bytes", f"byte {raw[error.start]:#04x} is not UTF-8; {advice()}"))
        except json.JSONDecodeError as error:
            following = next(filled, None)
            bad.add(row.fault("broken JSON", _broken(error, last=following is None)))
            filled = chain([] if following is None else [following], filled)
        except UntrustedError as error:
            bad.add(row.fault(error.fault.reason, error.fault.problem, error.fault.field or None))
        else:
            if isinstance(data, dict):
                row.data = data
                yield row
            else:
                bad.add(row.fault("not an object", f"a {type(data).__name__}, but every line must be an object"))


def _lines(head: bytes, stream: BinaryIO, file: str) -> Iterator[bytes]:
    """The lines of a file of which the head was read already, without a byte order mark."""
    *whole, rest = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    yield from whole
    for number, line in enumerate(iter(functools.partial(stream.readline, LONGEST_LINE + 1), b""), len(whole) + 1):
        if len(rest) + len(line) > LONGEST_LINE:
            raise SteersmanError(
                f"{file}, line {number}: more than {LONGEST_LINE >> 20} MiB on one line, which is one row; "
                "split it, or leave it out"
            )
        yield rest + line
        rest = b""
    if rest:
        yield rest


def _broken(error: json.JSONDecodeError, *, last: bool) -> str:
    text = error.doc.rstrip()
    if text.lstrip().startswith(("{", "[")) and error.pos >= len(text) and not last:
        return (
            "the line holds the beginning of an object only; one object over several lines is a .json file: rename "
            "it, or write each object on one line"
        )
    if not text.lstrip().startswith(("{", "[")):
        return (
            "no JSON object, and every line must be one; the name of a table ends in .csv or .tsv, and that of plain "
            "text in .txt"
        )
    return f"not a whole JSON object ({error.msg}); was the file cut short?"


def json_file(text: str, file: str, bad: BadRows) -> Iterator[Row]:
    """A list of objects, an object that holds one, or several objects one after the other."""
    try:
        parsed = parse_suspect(text, file)
    except UntrustedError as error:
        raise SteersmanError(
            f"{file}, line {error.fault.line}: {error.fault.problem}; where it ends can not be told, so that no "
            "row can be left out"
        ) from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _concatenated(text, file, bad)
            return
        raise SteersmanError(
            f"{file}, line {error.lineno}: not whole JSON ({error.msg}); was the file cut short?"
        ) from error
    data = parsed.value
    if isinstance(data, dict):
        lists = [data[k] for k in ("examples", "data", "rows", "train") if isinstance(data.get(k), list)]
        data = lists[0] if lists else [data]
    if not isinstance(data, list):
        raise SteersmanError(f"{file}: a {type(data).__name__}; expected a list of objects")
    for number, item in enumerate(data, 1):
        yield from _checked(Parsed(item, parsed.suspect), Row({}, file, number), bad)


def _concatenated(text: str, file: str, bad: BadRows) -> Iterator[Row]:
    """Values one after the other, on a line each or over several; each row has the line where it begins."""
    first = text.lstrip().split("\n", 1)[0]
    try:
        json.JSONDecoder().raw_decode(first)
    except (ValueError, RecursionError):
        pass
    else:  # one a line, so that a bad one can be left out
        yield from jsonl(BytesIO(text.encode()), file, bad)
        return
    decoder, at, line = json.JSONDecoder(parse_int=lambda _: 0), 0, 1
    while True:
        found = _INK.search(text, at)
        if found is None:
            return
        begin = found.start()
        line, at = line + text.count("\n", at, begin), begin
        row = Row({}, file, line, "line")
        try:
            end = decoder.raw_decode(text, at)[1]
            parsed = parse_suspect(text[at:end], row.where())
        except UntrustedError as error:
            raise SteersmanError(str(error)) from error
        except RecursionError:
            raise SteersmanError(f"{row.where()}: nested too deeply") from None
        except json.JSONDecodeError as error:
            raise SteersmanError(
                f"{file}, line {error.lineno}: not whole JSON ({error.msg}); was the file cut short?"
            ) from error
        yield from _checked(parsed, row, bad)
        line, at = line + text.count("\n", at, end), end


def _checked(parsed: Parsed, row: Row, bad: BadRows) -> Iterator[Row]:
    fault = first_fault(parsed.value) if parsed.suspect else None
    if fault is not None:
        bad.add(row.fault(fault.reason, fault.problem, fault.field or None))
    elif isinstance(parsed.value, dict):
        row.data = parsed.value
        yield row
    else:
        bad.add(row.fault("not an object", f"a {type(parsed.value).__name__}, but every row must be an object"))


def csv_file(text: str, file: str, kind: str, bad: BadRows) -> Iterator[Row]:
    """A header line and a record for each row; a record with another number of fields is a bad row."""
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


def parquet(source: Path | bytes, file: str, bad: BadRows) -> Iterator[Row]:
    """The rows of a Parquet file, read piece by piece, without the nulls of `without_nulls`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        opened = pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source)
        repeated = [name for name, n in Counter(opened.schema_arrow.names).items() if n > 1]
        if repeated:
            raise SteersmanError(f"{file}: column {repeated[0]!r} occurs twice")
        for batch in opened.iter_batches(1024):
            yield from _of_batch(batch, file, number, bad)
            number += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SteersmanError(f"{file}: not a whole Parquet file ({error})") from error


def _of_batch(batch: Any, file: str, before: int, bad: BadRows) -> Iterator[Row]:
    import pyarrow as pa

    try:
        whole = batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):  # one value is enough: row by row, to name it
        whole = None
    for at in range(batch.num_rows):
        row, column = Row({}, file, before + at + 1), ""
        try:
            if whole is None:
                for column in batch.schema.names:
                    row.data[column] = batch[column][at].as_py()
            else:
                row.data = whole[at]
        except (pa.ArrowException, ValueError, OverflowError) as error:
            bad.add(row.fault("unreadable value", f"the value can not be read ({error})", column))
        else:
            row.data = without_nulls(row.data, bad)
            yield row


def without_nulls(data: dict[str, Any], bad: BadRows) -> dict[str, Any]:
    """A row of a container that has one schema for all rows (Parquet, Arrow), without the nulls inside its fields.

    Such a container gives every row each name that any row has, so that a name which was not there reads as null. In
    tool calls the model would be taught them; those are counted in `bad.nulls`.
    """

    def cleaned(value: Any, in_tools: bool) -> Any:
        if isinstance(value, list) and value and all(isinstance(x, tuple) for x in value):
            value = dict(value)  # a map of Arrow's
        if isinstance(value, list):
            return [cleaned(x, in_tools) for x in value]
        if not isinstance(value, dict):
            return value
        kept = {name: x for name, x in value.items() if x is not None}
        bad.nulls += (len(value) - len(kept)) * in_tools
        return {name: cleaned(x, in_tools or name in TOOL_FIELDS) for name, x in kept.items()}

    return {name: cleaned(value, name in TOOL_FIELDS) for name, value in data.items()}


def text(body: str, file: str, split: str) -> Iterator[Row]:
    """Plain text cut into rows at lines, blank lines or a separator line; see `read_rows`."""
    lines = body.replace("\r\n", "\n").split("\n")
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
