"""Dialogue: the next turn after up to five turns.

Original: DailyDialog, arXiv 1710.03957 (the paper's intent reward is a classifier: give it with
per_task.dialogue.reward). Stand-in: SGD's dev dialogues, arXiv 1909.05855, the system's turns; whole dialogues on
one side of the split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from steersman.grue.task import Hub, Row, Task, in_split, json_lines

TURNS = 5


def _turns(said: Sequence[str], places: Iterable[int]) -> Iterable[Row]:
    """A row for each place: what was said before it, speakers in turn, and what was said there."""
    for t in places:
        start = max(0, t - TURNS)
        lines = [f"{'AB'[i % 2]}: {said[i].strip()}" for i in range(start, t)]
        yield {"history": "\n".join([*lines, f"{'AB'[t % 2]}:"]), "references": [said[t].strip()]}


def conversation(row: Row) -> Iterable[Row]:
    """A row of the set, or a line of its authors' text files."""
    said = row["text"].split("__eou__") if "text" in row else row["dialog"]
    said = [turn for turn in said if turn.strip()]
    yield from _turns(said, range(1, len(said)))


def stand_in(folder: Path, split: str) -> Iterable[Row]:
    for row in json_lines(folder / "sgd_dialogues" / "dev_dialogues.text_and_acts.jsonl"):
        if in_split(row["dialogue_id"], split):
            said = [turn["utterance"] for turn in row["turns"]]
            system = [t for t, turn in enumerate(row["turns"]) if turn["speaker"] == "SYSTEM" and t > 0]
            yield from _turns(said, system)


TASK = Task(
    name="dialogue",
    about="the next turn of a conversation",
    prompt="{history}",
    rewards={"meteor": {"metric": "meteor"}},
    metrics={
        "sacrebleu": {"metric": "sacrebleu"},
        "rougeL": {"metric": "rougeL"},
        "meteor": {"metric": "meteor"},
    },
    generation={"max_new_tokens": 32, "temperature": 0.7, "top_k": 50},
    original=Hub(
        "li2017dailydialog/daily_dialog",
        {"train": "train", "validation": "validation", "test": "test"},
        conversation,
        how_to_get="the set on the hub is a loading script, which datasets 4 no longer runs; put its authors' files "
        "dialogues_train.txt and dialogues_validation.txt there as sets/dialogue/train.txt and validation.txt",
    ),
    files=stand_in,
)
