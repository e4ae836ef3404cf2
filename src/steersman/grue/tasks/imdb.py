"""Sentiment continuation: go on with a review (or story) so that it is positive.

Original: IMDB (Maas et al. 2011), 64 tokens in, 48 out, and a learned classifier as the reward; here the prompt is
the first words of a review. Give the paper's reward with per_task.imdb.reward: {mood: {metric: classifier, args:
{path: ..., label: POSITIVE}}}. Stand-in: vaderSentiment's movie snippets and TinyStories, as many of each.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from steersman.grue.task import Hub, Row, Task, first_words, in_split, text_lines, text_of

MOST = 2000


def review(row: Row) -> Iterable[Row]:
    start, rest = first_words(row["text"].replace("<br />", " "), 48)
    if rest:
        yield {"start": start, "references": [first_words(rest, 36)[0]]}


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
    original=Hub("stanfordnlp/imdb", {"train": "train", "validation": "test"}, review),
    files=stand_in,
)
