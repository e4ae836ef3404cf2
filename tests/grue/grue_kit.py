"""A tiny task in a file, its data, and a matrix of it with the included story model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steersman.assets import story_model

TASK = """
import json
from steersman.grue import Task

def files(folder, split):
    for line in (folder / f"{split}.jsonl").read_text().splitlines():
        yield json.loads(line)

TASK = Task(
    name="colours", about="a sentence with a colour", prompt="A {thing} is",
    rewards={"rougeL": {"metric": "rougeL"}},
    metrics={"rougeL": {"metric": "rougeL"}, "length": {"metric": "length"}},
    generation={"max_new_tokens": 8}, files=files,
)
"""


def write_task(folder: Path, text: str = TASK) -> Path:
    """The task's file and its data, train and validation."""
    (folder / "colours.py").write_text(text)
    things = ["ball", "cat", "dog", "tree", "house", "car", "boat", "bird", "fish", "shoe", "hat", "cup"]
    for split, part in (("train", things), ("validation", [f"big {t}" for t in things[:6]])):
        rows = [{"thing": t, "references": [f"red and the {t} is nice.", f"blue {t}."]} for t in part]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "colours.py"


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """A recipe of three cells."""
    return {
        "tasks": [str(write_task(folder))],
        "methods": ["zero-shot", "supervised", "supervised+grpo"],
        "seeds": [0],
        "model": {"path": str(story_model())},
        "data": {"source": "files", "folder": str(folder), "train": 10, "held_out": 6},
        "supervised": {"train": {"max_steps": 2, "batch_size": 4}},
        "rl": {"iterations": 3, "prompts": 2, "samples": 2, "looks": 3},
        "algorithms": {"grpo": {"epochs": 1, "minibatches": 1}},
        "evaluation": {"msttr_segment": 5},
        "run": {"dir": str(folder / "matrix"), "threads": 1, "eval_every": 1, "save_every": 1},
        **more,
    }
