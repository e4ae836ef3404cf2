"""Dialogue: the next turn after five turns.

Original: DailyDialog, arXiv 1710.03957, every turn that has five before it, as the benchmark's authors take them
(allenai/RL4LMs). Departures: the turns stand under each other behind A and B (theirs are joined by "<EOU>", with
which their references end too); of turns that were said after the same five, the first one's intent counts for all.

Their reward is a classifier of the intent, to be given with per_task.dialogue.reward (docs/grue.md says how). It
reads the columns `last`, the turn before, and `intent`, the turn's dialogue act by the classifier's numbers, one less
than the set's: 0 inform, 1 question, 2 directive, 3 commissive. The text files of the set's authors have no acts, so
their rows have no `intent`.

Stand-in: SGD's dev dialogues, arXiv 1909.05855, the system's turns after up to five; whole dialogues on one side of
the split; without intents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from steersman.grue.task import Hub, Row, Task, in_split, json_lines

TURNS = 5


def _turns(said: Sequence[str], places: Iterable[int]) -> Iterable[Row]:
    """A row for each place: what was said before it, speakers in turn, the last of that, and what was said there."""
    for t in places:
        start = max(0, t - TURNS)
        lines = [f"{'AB'[i % 2]}: {said[i].strip()}" for i in range(start, t)]
        history = "\n".join([*lines, f"{'AB'[t % 2]}:"])
        yield {"history": history, "last": said[t - 1].strip(), "references": [said[t].strip()]}


def conversation(row: Row) -> Iterable[Row]:
    """A row of the set, or a line of its authors' text files."""
    if "text" in row:
        said = [turn for turn in row["text"].split("__eou__") if turn.strip()]
        yield from _turns(said, range(TURNS, len(said)))
        return
    said, acts = row["dialog"], row["act"]
    if len(said) != len(acts):
        raise ValueError(f"a dialogue has {len(said)} turns and {len(acts)} acts: {' '.join(said)[:60]!r}")
    places = range(TURNS, len(said))
    for t, made in zip(places, _turns(said, places), strict=True):
        yield made | {"intent": acts[t] - 1}


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
        "dialogues_train.txt and dialogues_validation.txt there as sets/dialogue/train.txt and validation.txt "
        "(docs/grue.md says how to put their acts beside them)",
    ),
    files=stand_in,
)
