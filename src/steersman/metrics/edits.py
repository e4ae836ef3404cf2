"""Edits of the translation edit rate, equal to sacrebleu's count and many times faster.

The rate's cost is its search for block moves: each step tries hundreds of them, and sacrebleu fills a table of edit
operations in Python for each. Here a move gets its plain edit distance from `rapidfuzz`, which is never above the
distance within sacrebleu's beam; only the best one is then measured within the beam, and the search goes on among
the others where that is more. So the chosen moves, and with them the count, are sacrebleu's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from jaxtyping import Int32

LONGEST_MOVE, FARTHEST_MOVE, MOST_MOVES, BEAM = 10, 50, 1000, 25
FAR = 1 << 20
"""Edits of a cell outside the beam."""

Table = Int32[np.ndarray, "I J"]


def edits(text: Sequence[str], reference: Sequence[str]) -> int:
    """Insertions, deletions, replacements and moves of blocks that make the reference of the text.

    Moves are taken one at a time, each the one that saves most edits, as in Tercom; of those that save as much the
    longest, then the first. Only runs of words that the reference has elsewhere, and that stand wrong on both
    sides, are moved. Source: Snover et al. 2006, sec. 3; limits as in sacrebleu 2.6.
    """
    if not text or not reference:
        return max(len(text), len(reference))
    number: dict[str, int] = {}
    said, wanted = ([number.setdefault(word, len(number)) for word in words] for words in (text, reference))
    table = beam_table(said, wanted)
    moves = tried = 0
    while True:
        options = list(_moves(said, wanted, table))
        tried += len(options)
        if tried >= MOST_MOVES or not options:
            break
        found = _best(said, wanted, options, int(table[-1, -1]))
        if found is None:
            break
        said, table = found
        moves += 1
    return moves + int(table[-1, -1])


def beam_table(said: Sequence[int], wanted: Sequence[int]) -> Table:
    """Edit distances of all beginnings of the text [I + 1] and the reference [J + 1], near the diagonal.

    Row i is filled from `BEAM` columns before i J / I to as many after it, wider where the lengths differ much.
    """
    rows, columns = len(said), len(wanted)
    ratio = columns / rows
    beam = math.ceil(ratio / 2 + BEAM) if ratio / 2 > BEAM else BEAM
    table = np.full((rows + 1, columns + 1), FAR, dtype=np.int32)
    column = table[0] = np.arange(columns + 1, dtype=np.int32)
    differs = np.asarray(said)[:, None] != np.asarray(wanted)
    for i in range(1, rows + 1):
        diagonal = math.floor(i * ratio)
        low = max(0, diagonal - beam)
        high = columns + 1 if i == rows else min(columns + 1, diagonal + beam)
        before, row = table[i - 1], table[i, low:high]
        np.add(before[low:high], 1, out=row)
        inner = max(low, 1)
        np.minimum(row[inner - low :], before[inner - 1 : high - 1] + differs[i - 1, inner - 1 : high - 1],
                   out=row[inner - low :])  # fmt: skip
        # an insertion adds one to the cell on the left: the least of (cell - its column), plus the column
        row -= column[low:high]
        np.minimum.accumulate(row, out=row)
        row += column[low:high]
    return table


Move = tuple[int, int, int, list[int]]
"""Length, and with a minus sign where it was and where it goes (so that the largest is taken), and the new text."""


def _moves(said: list[int], wanted: list[int], table: Table) -> Iterator[Move]:
    """All moves that are worth a try, until there are too many."""
    place, wrong_wanted, wrong_said = _alignment(said, wanted, table)
    # errors before each position, so that those of a run are a difference
    errors_wanted, errors_said = ([0, *accumulate(wrong)] for wrong in (wrong_wanted, wrong_said))
    count = 0
    for start, other, length in _runs(said, wanted):
        if errors_said[start] == errors_said[start + length] or errors_wanted[other] == errors_wanted[other + length]:
            continue
        if start <= place[other] < start + length:
            continue
        last = -1
        for at in range(other - 1, other + length):
            target = 0 if at < 0 else place[at] + 1
            if target == last:
                continue
            last = target
            yield length, -start, -target, _moved(said, start, length, target)
            count += 1
        if count >= MOST_MOVES:
            return


def _best(said: list[int], wanted: list[int], options: list[Move], now: int) -> tuple[list[int], Table] | None:
    """The text after the move that saves most, with its table; None where none saves anything."""
    from rapidfuzz.distance import Levenshtein

    least: dict[tuple[int, ...], int] = {}
    for *_, words in options:
        key = tuple(words)
        if key not in least:
            # one that saves nothing is not measured to the end
            least[key] = Levenshtein.distance(words, wanted, score_cutoff=now - 1)
    ranked = sorted(((now - least[tuple(m[-1])], *m) for m in options if least[tuple(m[-1])] < now), reverse=True)
    tables: dict[tuple[int, ...], Table] = {}
    while ranked:
        saved, length, start, target, words = ranked[0]
        key = tuple(words)
        if key not in tables:
            tables[key] = beam_table(words, wanted)
        table = tables[key]
        within = now - int(table[-1, -1])
        if within == saved:
            return words, table
        ranked[0] = (within, length, start, target, words)
        ranked = sorted((m for m in ranked if m[0] > 0), reverse=True)
    return None


def _alignment(said: list[int], wanted: list[int], table: Table) -> tuple[list[int], list[bool], list[bool]]:
    """For each word of the reference the place in the text that it stands for; which are wrong, on either side.

    Of ways that cost the same a replacement is taken before a deletion, and that before an insertion.
    """
    i, j = len(said), len(wanted)
    place, wrong_wanted, wrong_said = [0] * j, [True] * j, [True] * i
    cells = table.tolist()
    while i or j:
        differs = i > 0 and j > 0 and said[i - 1] != wanted[j - 1]
        if i and j and cells[i][j] == cells[i - 1][j - 1] + differs:
            i, j = i - 1, j - 1
            place[j], wrong_wanted[j], wrong_said[i] = i, differs, differs
        elif i and (not j or cells[i][j] == cells[i - 1][j] + 1):
            i -= 1
        else:
            j -= 1
            place[j] = i - 1
    return place, wrong_wanted, wrong_said


def _runs(said: list[int], wanted: list[int]) -> Iterator[tuple[int, int, int]]:
    """(start in the text, start in the reference, length) of every run of words that both have."""
    where: dict[int, list[int]] = {}
    for j, word in enumerate(wanted):
        where.setdefault(word, []).append(j)
    for i, word in enumerate(said):
        for j in where.get(word, ()):
            if abs(j - i) > FARTHEST_MOVE:
                continue
            longest = min(LONGEST_MOVE, len(said) - i, len(wanted) - j)
            for length in range(1, longest + 1):
                if said[i + length - 1] != wanted[j + length - 1]:
                    break
                yield i, j, length


def _moved(said: list[int], start: int, length: int, target: int) -> list[int]:
    """The text with `length` words from `start` taken out and put in before place `target` of the old text.

    A target within the run counts from the run's start, in the text without it.
    """
    block, rest = said[start : start + length], said[:start] + said[start + length :]
    if target < start:
        at = target
    elif target > start + length:
        at = target - length
    else:
        at = target
    return rest[:at] + block + rest[at:]
