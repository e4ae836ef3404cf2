"""Sentences drawn at random from README and docs, to be read as someone does who has never met the project.

    python tools/sentences.py [--seed 0] [--count 20]

Code blocks, tables, headings and generated pages are left out. Write down which are not understood at first reading,
rewrite those, and draw twenty more with the next seed, until a draw has none.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("grue-samples.md", "grue-tables.md", "grue-goodhart.md", "families.md")
SHORTEST = 25  # characters; what is shorter is a fragment


def paragraphs(text: str) -> list[str]:
    """The running text: no code, no tables, no headings; each item of a list is one."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    out: list[str] = []
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        lines = [line for line in block.splitlines() if line.strip()]
        plain = [line for line in lines if not line.startswith(("    ", "#", "|", "!", "---"))]
        if plain and len(plain) == len(lines):
            out.append(" ".join(line.strip() for line in plain))
    return out


def sentences(text: str) -> list[str]:
    found = [s.strip() for p in paragraphs(text) for s in re.split(r"(?<=[.!?])\s+(?=[A-Z`*\[(])", p)]
    return [s for s in found if len(s) >= SHORTEST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    args = parser.parse_args()
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    every = [
        (page.relative_to(ROOT), sentence)
        for page in pages
        if page.name not in GENERATED
        for sentence in sentences(page.read_text())
    ]
    for page, sentence in random.Random(args.seed).sample(every, args.count):
        print(f"{page}\n    {sentence}\n")


if __name__ == "__main__":
    main()
