"""A stream of rows: read, tokenised and shuffled buffer by buffer, and taken up again where it was left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from steersman.data.batches import Batches
from steersman.data.encode import Encoded, EncodedSet, put, require_known
from steersman.data.load import each_example
from steersman.data.rows import BadRows
from steersman.data.shapes import Kind, Shape
from steersman.data.split import passed_over, prompt_key
from steersman.data.tokenize import Layout
from steersman.types import SteersmanError

Pass = Callable[[BadRows], Iterator[Any]]
"""Begins a pass over all examples of a set, which counts the rows that it leaves out."""


def open_streams(
    config: Any, kind: Kind, paths: Sequence[Any], held: Sequence[Any]
) -> tuple[list[Shape], list[Pass]]:
    """What the rows of each path are, and how a pass over them begins; prompts that are held out are passed over."""
    held_keys = frozenset(prompt_key(e) for e in held)

    def begins(path: Any) -> Pass:
        def begin(bad: BadRows) -> Iterator[Any]:
            _, found = each_example(config, path, kind, bad)
            return islice(passed_over(found, held_keys, bad), config.limit)

        return begin

    shapes = [each_example(config, path, kind, BadRows(config.on_bad_row))[0] for path in paths]
    return shapes, [begins(path) for path in paths]


@dataclass(frozen=True, slots=True)
class Order:
    """How a stream is cut into batches; `by_length` puts rows of like length together."""

    batch_size: int
    seed: int
    by_length: bool = True


@dataclass(slots=True)
class Position:
    """How far a set was read: whole passes, examples of the current pass, and rows that it gave so far."""

    passes: int = 0
    examples: int = 0
    rows: int = 0


class Streamed:
    """Batches without end out of sets of rows that are read while training, by their places in the current window,
    which is the `TrainingSet`.

    A window is as many rows as the buffer holds, in whole batches. Of several sets the one that is furthest behind
    its share gives the next row, and a set that is at its end begins again. Within a window rows are shuffled, and
    with `by_length` batched by like length, as `Batches` does. The order depends on (seed, window) and the files
    alone.

    `state_dict` after a batch names the position of the window in the files, and the next batch. A resumed run reads
    the files of the current pass again up to there, without tokenising them. `left_out` counts the rows that are left
    out of the first pass, as far as it was read.

    Raises SteersmanError for a set without a row that fits, and for a state of another seed, batch size or buffer.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        laid: Layout,
        config: Any,
        context: int | None,
        order: Order,
        left_out: BadRows,
    ) -> None:
        self.passes, self.laid, self.config, self.order = passes, laid, config, order
        self.left_out = left_out
        self.room = laid.room(config.max_prompt_tokens, config.max_length, context)
        self.size = max(config.buffer // order.batch_size, 1) * order.batch_size
        self.shares = np.array(config.mix or [1.0]) / sum(config.mix or [1.0])
        self.positions = [Position() for _ in passes]
        self.begun, self.number, self.next = self._now(), 0, 0
        self.open: list[Iterator[Any] | None] = [None for _ in passes]
        self.window: EncodedSet[Any] = EncodedSet()
        self._fill()

    @property
    def groups(self) -> list[list[Encoded]]:
        return self.window.groups

    @property
    def examples(self) -> list[Any]:
        return self.window.examples

    @property
    def lengths(self) -> np.ndarray:
        return self.window.lengths

    @property
    def in_memory(self) -> bool:
        return False

    def values(self, name: str) -> np.ndarray:
        """A field of the window's examples as numbers; NaN where there is none."""
        return self.window.values(name)

    def forever(self) -> Iterator[list[int]]:
        """Batches of places in the window, which changes between two of them."""
        while True:
            order = self._batches()
            while self.next < len(order):
                self.next += 1
                yield order[self.next - 1]
            self.begun, self.number, self.next = self._now(), self.number + 1, 0
            self._fill()

    def _batches(self) -> list[list[int]]:
        rows, size = len(self.window.groups), self.order.batch_size
        lengths = self.lengths if self.order.by_length else None
        return Batches(rows, size, self.order.seed, lengths, shuffle=self.size > size).order(self.number)

    def _fill(self) -> None:
        self.window = EncodedSet()
        while len(self.window.groups) < self.size:
            given = np.array([p.rows for p in self.positions])
            self._row_of(int(np.argmax(self.shares * (given.sum() + 1) - given)))
        require_known(self.window, self.laid)

    def _row_of(self, k: int) -> None:
        """Puts the next row of a set that fits into the window."""
        position, fitted = self.positions[k], False
        while not fitted:
            stream = self.open[k]
            if stream is None:
                bad = BadRows(self.config.on_bad_row) if position.passes else self.left_out
                stream = self.open[k] = islice(self.passes[k](bad), position.examples, None)
            example = next(stream, None)
            if example is None:
                if position.examples == 0 or position.rows == 0:
                    raise SteersmanError(
                        f"data.stream: no row of set {k + 1} of {len(self.passes)} fits; see data.max_length"
                    )
                position.passes, position.examples, self.open[k] = position.passes + 1, 0, None
                continue
            position.examples += 1
            fitted = put(self.window, example, self.laid, self.config, self.room)
        position.rows += 1

    def _now(self) -> list[dict[str, int]]:
        return [{"passes": p.passes, "examples": p.examples, "rows": p.rows} for p in self.positions]

    def state_dict(self) -> dict[str, Any]:
        return {
            "sets": self.begun, "window": self.number, "next": self.next, "seed": self.order.seed,
            "batch_size": self.order.batch_size, "size": self.size, "shares": self.shares.tolist(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = self.state_dict()
        same = ("seed", "batch_size", "size", "shares")
        changed = [f"{name} {state.get(name)} -> {now[name]}" for name in same if state.get(name) != now[name]]
        if changed:
            raise SteersmanError(
                f"can not resume the stream: {', '.join(changed)}; resume with the data and recipe of the run"
            )
        self.positions = [Position(**position) for position in state["sets"]]
        self.open = [None for _ in self.passes]
        self.left_out = BadRows(self.config.on_bad_row)
        self.begun, self.number, self.next = self._now(), state["window"], state["next"]
        self._fill()
