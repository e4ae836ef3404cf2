"""Two rankings in one list: where a person picks among several results, a pick tells which ranking put it there.

Each user sees both rankings at once, so that users' own habits cancel out and far fewer of them are needed than where
each sees one ranking. A list's credit is an outcome of the metric `win`.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def team_draft(first: Sequence[T], second: Sequence[T], length: int, rng: random.Random) -> list[tuple[T, int]]:
    """A list of `length` items, each with the ranking (0 or 1) that placed it.

    Again and again the ranking with fewer items so far (a coin where they have as many) places its best item that is
    not in the list. The list ends early where neither has one left.

    Source: Radlinski, Kurup and Joachims 2008, "How does clickthrough data reflect retrieval quality?", algorithm 2.
    """
    rankings, counts, placed, out = (first, second), [0, 0], set[T](), list[tuple[T, int]]()
    while len(out) < length:
        side = rng.randrange(2) if counts[0] == counts[1] else int(counts[0] > counts[1])
        found = [next((item for item in ranking if item not in placed), None) for ranking in rankings]
        if found == [None, None]:
            break
        if found[side] is None:
            side = 1 - side
        item = found[side]
        assert item is not None
        placed.add(item)
        counts[side] += 1
        out.append((item, side))
    return out


def credit(shown: Sequence[tuple[T, int]], picked: Iterable[T]) -> float:
    """Share of the second ranking: 1 where more of its items were picked, 0 where fewer, else 0.5."""
    side = dict(shown)
    lead = sum(1 if side[item] else -1 for item in picked if item in side)
    return 0.5 if lead == 0 else float(lead > 0)
