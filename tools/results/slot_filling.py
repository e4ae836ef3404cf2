"""Real conversations of the schema-guided dialogue set as rows of a simulated user with a script.

python tools/results/slot_filling.py rows dev_dialogues.text_and_acts.jsonl rows.jsonl

The user's opening is its first utterance, its facts are its later utterances that inform, and the values are the
names, numbers and times in them that the system's first confirmation repeats. Conversations without two such facts
or without such values are left out.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

TASK = (
    "You take orders. Ask for what you need to know. When you know all, repeat the order without a question."
    "\n\nCustomer: "
)
VALUE = re.compile(r"\d{1,2}:\d\d|\d+|(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")
"""Times, numbers, and names inside a sentence."""


def row_of(dialogue: dict[str, Any]) -> dict[str, Any] | None:
    """One conversation as a row; None where it has no script in it."""
    turns = dialogue["turns"]
    until = next((i for i, t in enumerate(turns) if t["speaker"] == "SYSTEM" and "CONFIRM" in t["acts"]), None)
    if until is None or turns[0]["speaker"] != "USER":
        return None
    informs = [t["utterance"] for t in turns[1:until] if t["speaker"] == "USER" and "INFORM" in t["acts"]]
    goal = " ".join([turns[0]["utterance"], *informs])
    confirmed = turns[until]["utterance"].lower()
    values = [v for v in dict.fromkeys(VALUE.findall(goal)) if v.lower() in confirmed]
    if len(informs) < 2 or not values:
        return None
    return {
        "prompt": TASK, "opening": turns[0]["utterance"], "facts": informs, "values": values, "goal": goal,
        "character": "Someone who writes short messages.", "dialogue_id": dialogue["dialogue_id"],
    }  # fmt: skip


def rows(source: Path, target: Path) -> int:
    """Writes the rows; returns how many."""
    found = [row_of(json.loads(line)) for line in source.open(encoding="utf-8")]
    kept = [row for row in found if row is not None]
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return len(kept)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "rows":
        sys.exit(__doc__)
    print(f"{rows(Path(sys.argv[2]), Path(sys.argv[3]))} rows in {sys.argv[3]}")
