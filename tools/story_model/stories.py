"""Real stories, cleaned and split: what the other scripts of this folder start from."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."})
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def real_stories(data: Path) -> tuple[list[str], list[str]]:
    """(training, held-out) stories of `data`/tinystories; one in twenty is held out, chosen by its own hash.

    Typographic quotes and dashes become plain ones; stories with other characters outside ASCII are left out.
    """
    text = "\n".join(p.read_text(encoding="utf-8") for p in sorted((data / "tinystories").glob("*.txt")))
    stories = [re.sub(r"\n+", "\n", s.translate(PLAIN).strip()) for s in text.split("<|endoftext|>")]
    stories = [s for s in dict.fromkeys(stories) if s and s.isascii()]
    held = {s for s in stories if int(hashlib.sha256(s.encode()).hexdigest(), 16) % 20 == 0}
    return [s for s in stories if s not in held], [s for s in stories if s in held]


def first_sentence(story: str) -> str:
    """Up to the first full stop that ends a sentence outside quotes."""
    match = re.match(r'[^"\n]+?\.(?=\s)', story)
    return match.group(0) if match else ""


def words(text: str) -> list[str]:
    return WORD.findall(text)
