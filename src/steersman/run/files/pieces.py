"""A table that takes long to make, made in pieces, each saved as soon as it is complete.

    FOLDER/about.json                  how many items there are, and what their rows are made from and how
    FOLDER/00000000-00000512.jsonl     the rows of items 0 to 511

A process that dies loses the piece that it was making; the next one makes what is missing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from steersman.atomic import saving, write_atomic
from steersman.config.dump import changed_keys
from steersman.distributed.ranks import ranks
from steersman.jsonl import jsonl_text, read_jsonl
from steersman.run.progress import ProgressLine
from steersman.types import Progress

Rows = list[dict[str, Any]]
_NAME = re.compile(r"(\d{8,})-(\d{8,})\.jsonl")


class Pieces:
    """The pieces of `count` items' rows in `folder`; `about` is plain data that says what they are made from and how.

    Of several ranks all make rows, and share that work; rank 0 alone reads and writes the pieces.
    """

    def __init__(self, folder: Path, count: int, about: Mapping[str, Any]) -> None:
        self.folder, self.count = folder, count
        self.about: dict[str, Any] = json.loads(json.dumps({"items": count, **about}, default=str))

    def changes(self) -> list[str]:
        """What is not as it was for the pieces that are there, as `key: then -> now`; nothing where none is there."""
        return ranks().from_main(self._changes, "the pieces that are there")

    def begin(self) -> None:
        """Makes the folder ready; pieces that are made of something else go.

        Raises SteersmanError where it can not be written.
        """
        ranks().from_main(self._begin, "the folder of pieces")

    def fill(
        self, size: int, make: Callable[[range, Progress], Rows], line: ProgressLine,
        between: Callable[[], None] = lambda: None,
    ) -> Rows:  # fmt: skip
        """All rows, those of the first item first: what is missing is made and kept, up to `size` items at a time.

        `make` gives the rows of some items, on every rank the same; it may tell how far it is with them. `between` is
        called before each piece, and may raise. Raises SteersmanError where the disk is full; what was kept stays.
        """
        missing = self.missing(size)
        left, done = sum(map(len, missing)), 0
        for span in missing:
            between()
            rows = make(span, partial(_tell, line, done, len(span), left))
            ranks().from_main(partial(self._keep, span, rows), "a piece of a table")
            done += len(span)
            line(done, left)
        return ranks().from_main(self._rows, "the pieces of a table")

    def missing(self, size: int) -> list[range]:
        """The items that no piece has, in ranges of up to `size`."""
        return ranks().from_main(partial(self._missing, size), "the pieces that are there")

    def remove(self) -> None:
        """For when the rows are kept elsewhere."""
        ranks().from_main(lambda: shutil.rmtree(self.folder, ignore_errors=True), "the pieces of a table")

    def _changes(self) -> list[str]:
        if not self._found():
            return []
        before: Any = {}
        with suppress(OSError, ValueError):
            before = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        return changed_keys(before, self.about)

    def _begin(self) -> None:
        if self._changes():
            shutil.rmtree(self.folder)
        with saving(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "about.json", json.dumps(self.about, indent=1, ensure_ascii=False))

    def _missing(self, size: int) -> list[range]:
        out, at = [], 0
        for span in [*self._found().values(), range(self.count, self.count)]:
            out += [range(i, min(i + size, span.start)) for i in range(at, span.start, size)]
            at = span.stop
        return out

    def _keep(self, span: range, rows: Rows) -> None:
        text = jsonl_text(rows)
        write_atomic(self.folder / f"{span.start:08d}-{span.stop:08d}.jsonl", text)

    def _rows(self) -> Rows:
        return [row for file in self._found() for row in read_jsonl(file)]

    def _found(self) -> dict[Path, range]:
        """The pieces with the items of each, in order."""
        names = {file: _NAME.fullmatch(file.name) for file in self.folder.glob("*")}
        spans = {file: range(int(m[1]), int(m[2])) for file, m in names.items() if m is not None}
        return dict(sorted(spans.items(), key=lambda piece: piece[1].start))


def _tell(line: ProgressLine, before: int, items: int, left: int, done: int, total: int, _tokens: int = 0) -> None:
    line(before + items * done // total, left)
