"""A library to search: sections of stories, found by SQLite's full-text index (BM25)."""

from __future__ import annotations

import csv
import functools
import re
import sqlite3
import string
import threading

WORD = re.compile(r"[a-z']{2,}")


class Library:
    """Which section of which story answers a question? Two searches; each is answered by the best section's opening.

    The words of the question are listed under letters, and a search names letters: a small model does not copy words
    that are new to it. `sections` are tables with the columns story, section and text. A row has `question`, and
    `story` and `section`, the numbers of those that hold the answer. The return is 1 / rank of the best of them in
    the better of the two searches, 0 where it is not among the first ten. At most `words` words of a search count.
    """

    def __init__(self, sections: list[str], words: int = 3) -> None:
        self.shelf, self.words = shelf(tuple(sections)), words

    def begin(self, row):
        self.wanted = {f"{row['story']} {section}" for section in row["section"]}
        self.listed = listed(row["question"])
        self.left, self.earned = 2, 0.0
        return "\nWords:" + "".join(f" {letter} {word}" for letter, word in self.listed.items()) + "\nSearch:"

    def step(self, text):
        named = [self.listed[name] for name in text.split() if name in self.listed]
        found = self.shelf.search(list(dict.fromkeys(named))[: self.words])
        score = next((1 / rank for rank, (key, _) in enumerate(found, 1) if key in self.wanted), 0.0)
        gain, self.left = max(score - self.earned, 0.0), self.left - 1
        self.earned += gain
        opening = " ".join(found[0][1].split()[:10]) if found else "nothing"
        return f" -> {opening}\nSearch:", gain, self.left == 0 or self.earned == 1.0


def listed(question: str) -> dict[str, str]:
    """The question's words under letters, each word once."""
    return dict(zip(string.ascii_lowercase, dict.fromkeys(WORD.findall(question.lower())), strict=False))


class Shelf:
    """The sections in an index in memory; searches of several threads take turns."""

    def __init__(self, sections: tuple[str, ...]) -> None:
        self.base, self.lock = sqlite3.connect(":memory:", check_same_thread=False), threading.Lock()
        self.base.execute("create virtual table shelf using fts5(key unindexed, text, tokenize='porter')")
        for path in sections:
            with open(path, newline="", encoding="utf-8") as file:
                rows = ((f"{row['story']} {row['section']}", row["text"]) for row in csv.DictReader(file))
                self.base.executemany("insert into shelf values (?, ?)", rows)

    def search(self, words: list[str], limit: int = 10) -> list[tuple[str, str]]:
        """Keys and texts of the sections that hold any of the words, the best first."""
        asked = " OR ".join(f'"{word}"' for word in words)
        if not asked:
            return []
        with self.lock:
            ask = "select key, text from shelf where text match ? order by bm25(shelf) limit ?"
            return self.base.execute(ask, (asked, limit)).fetchall()


@functools.cache
def shelf(sections: tuple[str, ...]) -> Shelf:
    return Shelf(sections)
