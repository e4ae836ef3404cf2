"""Sentiment continuation: go on with a review (or story) so that it is positive.

Original: IMDB (Maas et al. 2011) as the benchmark's authors cut it (allenai/RL4LMs): the first half of a review is
the prompt, of which the model reads the end; `validation` is a fifth of the set's training split; supervised cells
learn on positive reviews alone. Departures: the prompt is the last 48 words of that half (theirs is its last 64
tokens, and their classifier reads the whole half); a reference is the first 36 words of the second half (theirs is
all of it); the fifth is chosen by a hash (theirs anew in each run); "<br />" is a space; negative reviews are left
out of the held-out demonstrations too.

Their reward is a classifier, to be given with per_task.imdb.reward (docs/grue.md says how). The column `label` is 1
for a positive review and 0 for a negative one.

Stand-in: vaderSentiment's movie snippets and TinyStories, as many of each, without labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from steersman.grue.task import Hub, Row, Task, first_words, in_split, text_lines, text_of

MOST = 2000


def review(row: Row) -> Iterable[Row]:
    words = row["text"].replace("<br />", " ").split()
    half = len(words) // 2
    if half:
        start, rest = words[max(0, half - 48) : half], words[half : half + 36]
        yield {"start": " ".join(start), "references": [" ".join(rest)], "label": row["label"]}


def belongs(row: Row, split: str) -> bool:
    """Training and validation rows share the set's training split."""
    return split == "test" or in_split(row["text"], split, 0.2)


def stand_in(folder: Path, split: str) -> Iterable[Row]:
    snippets = (
        line.split("\t")[2]
        for line in text_lines(folder / "vader_sentiment" / "movieReviewSnippets_GroundTruth.part1.txt")
    )
    stories = text_of(folder / "tinystories" / "tinystories_sample.part1.txt").split("<|endoftext|>")
    for texts, words in ((snippets, 6), (stories, 12)):
        usable = (text for text in texts if len(text.split()) >= 2 * words)
        for text in islice(usable, MOST):
            start, rest = first_words(text, words)
            if in_split(start, split):
                yield {"start": start, "references": [first_words(rest, 36)[0]]}


TASK = Task(
    name="imdb",
    about="sentiment continuation: go on so that the text is positive",
    prompt="{start}",
    rewards={"sentiment": {"metric": "vader_sentiment"}},
    metrics={"sentiment": {"metric": "vader_sentiment"}, "rougeL": {"metric": "rougeL"}},
    generation={"max_new_tokens": 48, "temperature": 0.8, "top_k": 50},
    original=Hub(
        "stanfordnlp/imdb", {"train": "train", "validation": "train", "test": "test"}, review, belongs=belongs
    ),
    taught=lambda row: row.get("label", 1) == 1,
    files=stand_in,
)
