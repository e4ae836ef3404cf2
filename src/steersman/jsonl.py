"""Files of JSON Lines: a JSON value on each line.

Only a line feed ends a line here. `str.splitlines` breaks at U+2028, U+0085 and others as well, which stand in
people's texts and so inside the strings of these files.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from steersman.atomic import saving, unlinked
from steersman.guards.untrusted import UntrustedError, parse_json
from steersman.types import SteersmanError


def jsonl_text(rows: Iterable[Any]) -> str:
    """The rows as JSON Lines, each ended by a line feed; letters stand as they are, not as escapes."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_jsonl(path: Path, row: Any) -> None:
    """Adds one row to the end of a file and flushes it to the disk, so that a kill loses at most this one.

    A line that a kill cut short does not swallow the row. Threads and processes may share the file.
    Raises SteersmanError where the disk is full, the file is a link or can not be written.
    """
    # Half a surrogate pair becomes its escape, which JSON reads back.
    line = jsonl_text([row]).encode(errors="backslashreplace")
    with saving(path), open(path, "a+b", opener=unlinked) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file that steersman wrote, none where there is no file. A line that a kill cut short is
    left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def parse_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Each value of a file that someone else wrote, behind its place such as `rows.jsonl, line 3`; empty lines are
    passed over.

    Raises SteersmanError with the place of the first line that is no JSON or that `parse_json` refuses, and where the
    file can not be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise SteersmanError(f"{path}: can not be read ({error.strerror or error})") from error
    with file:
        for number, raw in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield place, parse_json(text, place)
            except UntrustedError as error:
                raise SteersmanError(str(error)) from error
            except UnicodeDecodeError as error:
                raise SteersmanError(f"{place}: byte {raw[error.start]:#04x} is not UTF-8") from error
            except json.JSONDecodeError as error:
                raise SteersmanError(f"{place}: no JSON ({error.msg}, character {error.pos})") from error
