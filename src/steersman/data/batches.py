"""The order of data: deterministic, bucketed by length, and resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from steersman.data.mixing import Mixture
from steersman.types import SteersmanError

BUCKET = 32
"""Batches per bucket: rows are sorted by length inside windows of so many batches."""


class Batches:
    """Lists of row numbers, epoch after epoch; every row once per epoch, or as often as a mixture draws it.

    The order of epoch e depends on (seed, e) and the lengths alone. With `lengths`, rows of like length share a
    batch (less padding): the shuffled rows are sorted by length within windows of 32 batches, and the batches
    are shuffled again. The last batch may be smaller, unless `drop_last`.

    `state_dict` after a batch names the next one, so a resumed run sees exactly the batches that were left. `content`
    names what the rows are, where that is known: rows of other content are other data.

    Raises SteersmanError for an empty set, a batch size below 1, a `drop_last` that drops everything, and a
    state that belongs to other data.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        lengths: Sequence[int] | np.ndarray | None = None,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        mix: Mixture | None = None,
        content: Sequence[str] = (),
    ) -> None:
        if size < 1 or batch_size < 1:
            raise SteersmanError(f"can not make batches of {batch_size} from {size} rows")
        if lengths is not None and len(lengths) != size:
            raise ValueError(f"{len(lengths)} lengths for {size} rows")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.shuffle, self.drop_last, self.mix, self.content = shuffle, drop_last, mix, list(content)
        self.epoch = self.position = 0
        if len(self) == 0:
            raise SteersmanError(f"{size} rows do not fill one batch of {batch_size}, and drop_last leaves it out")

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def order(self, epoch: int) -> list[list[int]]:
        """The batches of one epoch."""
        if not self.shuffle:
            rows = np.arange(self.size)
            return self._cut(rows)
        rng = np.random.default_rng((self.seed, epoch))
        rows = rng.permutation(self.size) if self.mix is None else self.mix.rows(self.seed, epoch)
        if self.lengths is None:
            return self._cut(rows)
        window = BUCKET * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, self.size, window):
            part = rows[start : start + window]
            # longest first, so that the one partial batch holds the shortest rows
            batches += self._cut(part[np.argsort(-self.lengths[part], kind="stable")])
        return [batches[i] for i in rng.permutation(len(batches))]

    def rows_of(self, count: int) -> list[int]:
        """The rows of the first `count` batches of a run, whatever batch is the next one."""
        found: set[int] = set()
        epoch = 0
        while count > 0 and len(found) < self.size:
            batches = self.order(epoch)[:count]
            found.update(row for batch in batches for row in batch)
            epoch, count = epoch + 1, count - len(batches)
        return sorted(found)

    def _cut(self, rows: np.ndarray) -> list[list[int]]:
        batches = [rows[i : i + self.batch_size].tolist() for i in range(0, len(rows), self.batch_size)]
        return batches[:-1] if self.drop_last and len(batches[-1]) < self.batch_size else batches

    def __iter__(self) -> Iterator[list[int]]:
        """What is left of the current epoch; afterwards the next epoch is current."""
        order = self.order(self.epoch)
        while self.position < len(order):
            batch = order[self.position]
            # counted before it is handed out: a state taken while it is worked on names the one after it
            self.position += 1
            if self.position == len(order):
                self.epoch, self.position = self.epoch + 1, 0
                yield batch
                return
            yield batch

    def forever(self) -> Iterator[list[int]]:
        """Batches without end, through all epochs."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "position": self.position, "seed": self.seed, "size": self.size,
            "batch_size": self.batch_size, "mix": [] if self.mix is None else list(self.mix.counts),
            "content": self.content,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now, before = self.state_dict(), {"mix": [], "content": [], **state}
        same = ("seed", "size", "batch_size", "mix", "content")
        changed = [f"{k} {before[k]} -> {now[k]}" for k in same if before[k] != now[k]]
        if changed:
            raise SteersmanError(
                f"can not resume the data order: {', '.join(changed)}; resume with the data and recipe of the run"
            )
        self.epoch, self.position = state["epoch"], state["position"]
