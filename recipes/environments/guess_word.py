"""A game of guessing words, and what the best player earns in it."""

from __future__ import annotations

import functools
import random
from collections import defaultdict

WORDS = (
    "cat", "cot", "act", "tap", "pat", "pot", "top", "opt", "lap", "alp", "pal", "oat", "tic", "pit", "tip", "lot",
)  # fmt: skip
GUESSES, RIGHT, WRONG = 5, 1.0, -0.2


class GuessWord:
    """Which of sixteen words is it? Every guess is answered by a mark for each of its letters.

    `+` stands for a letter in its right place, `-` for one that stands elsewhere in the word, `.` for one that does
    not occur. What is no such word is answered with `???` and costs as much as a wrong guess.
    """

    actions = WORDS

    def begin(self, row, seed=0):
        self.word = row.get("word") or random.Random(seed).choice(WORDS)
        self.left = GUESSES
        return None

    def step(self, text):
        guess, self.left = text.strip(), self.left - 1
        if guess == self.word:
            return "+++", RIGHT, True
        return marks(guess, self.word) if guess in WORDS else "???", WRONG, self.left == 0


def marks(guess: str, word: str) -> str:
    """What the game answers to a guess."""
    return "".join("+" if a == b else "-" if a in word else "." for a, b in zip(guess, word, strict=True))


@functools.cache
def optimum(possible: frozenset[str] = frozenset(WORDS), left: int = GUESSES) -> float:
    """The largest expected return, where `possible` are the words that it may still be, by all ways to play on."""
    return max(_worth(guess, possible, left) for guess in WORDS) if left else 0.0


def _worth(guess: str, possible: frozenset[str], left: int) -> float:
    parts = defaultdict(set)
    for word in possible:
        parts[marks(guess, word)].add(word)
    if set(parts) == {marks(guess, next(iter(possible)))} and guess not in possible:
        return -GUESSES  # it tells nothing
    return sum(
        len(part) * (RIGHT if answer == "+++" else WRONG + optimum(frozenset(part), left - 1))
        for answer, part in parts.items()
    ) / len(possible)
