"""The tasks of the chat-model study: rows, rewards and settings, read by both sides. Imports neither side."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
GRPO = {"prompts": 4, "samples": 8, "beta": 0.02, "lr": 1e-5, "temperature": 0.7, "clip": 0.2}
PAIRS = {"batch": 8, "lr": 1e-5, "max_length": 256, "warmup": 0.1}

TASKS: dict[str, dict[str, Any]] = {
    "sums": {"methods": ("grpo",), "trl_parts": 1, "new_tokens": 32, "held_out": 48, "iterations": 30, **GRPO},
    "rules": {"methods": ("grpo",), "trl_parts": 2, "new_tokens": 64, "held_out": 48, "iterations": 30, **GRPO},
    "gsm8k": {"methods": ("grpo",), "trl_parts": 4, "new_tokens": 128, "held_out": 48, "iterations": 30, **GRPO},
    "polite": {
        "methods": ("sft", "dpo", "simpo", "kto"), "new_tokens": 64, "held_out": 64, "train": 320, "judge": 400,
        **PAIRS,
    },
}  # fmt: skip
"""`trl_parts`: micro-batches of an update in TRL; in one of 32 answers of 64 tokens it takes 15.7 GB on `rules`."""
LOSSES: dict[str, dict[str, float]] = {
    "sft": {}, "dpo": {"beta": 0.1}, "simpo": {"beta": 2.0, "gamma": 1.0}, "kto": {"beta": 0.1}
}  # fmt: skip

QUIET = {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""What TRL's processes find in their environment."""

PEOPLE = {
    "prompts": 16, "samples": 2, "new_tokens": 48, "temperature": 0.7, "iterations": 12, "look_every": 4,
    "beta": 0.02, "minibatches": 2, "lr": 1e-5, "warmup": 2,
}  # fmt: skip
"""PPO of the people study."""


def write_rows(data: Path, out: Path) -> None:
    """`TASK.train.jsonl` and `TASK.held_out.jsonl` in `out`; `polite.judge.jsonl` for the reward model."""
    out.mkdir(parents=True, exist_ok=True)
    made = {"sums": sums(), "rules": rules(data), "gsm8k": gsm8k(data), "polite": polite(data)}
    for task, rows in made.items():
        random.Random(0).shuffle(rows)
        held = TASKS[task]["held_out"]
        tables = {"held_out": rows[:held], "train": rows[held:]}
        if task == "polite":
            train = TASKS[task]["train"]
            tables |= {"train": rows[held : held + train], "judge": rows[held + train :][: TASKS[task]["judge"]]}
        for name, table in tables.items():
            (out / f"{task}.{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


def sums() -> list[dict[str, Any]]:
    """Sums and differences of the numbers one to ten, in words."""
    rows = []
    for a in range(1, 11):
        for b in range(1, 11):
            rows.append(problem(f"{WORDS[a]} plus {WORDS[b]}", a + b))
            if a > b:
                rows.append(problem(f"{WORDS[a]} minus {WORDS[b]}", a - b))
    return rows


def problem(words: str, answer: int) -> dict[str, Any]:
    return {"prompt": f"What is {words}? Answer with a number in digits.", "answer": str(answer)}


def rules(data: Path) -> list[dict[str, Any]]:
    """IFEval's prompts of at most 300 characters that do not ask for many words or sentences."""
    rows = [json.loads(line) for file in sorted((data / "ifeval").glob("*.jsonl")) for line in file.open()]
    long = ("number_words", "number_sentences", "number_paragraphs", "repeat_prompt", "two_responses")

    def is_short(row: dict[str, Any]) -> bool:
        return len(row["prompt"]) <= 300 and not any(kind.endswith(long) for kind in row["instruction_id_list"])

    return [row for row in rows if is_short(row)]


def gsm8k(data: Path) -> list[dict[str, Any]]:
    """GSM8K's problems of at most 200 characters; the answer is the number behind its mark."""
    rows = [json.loads(line) for line in (data / "gsm8k/train.jsonl").open()]
    return [
        {"prompt": row["question"], "answer": row["answer"].rpartition("####")[2].strip()}
        for row in rows if len(row["question"]) <= 200
    ]  # fmt: skip


def polite(data: Path) -> list[dict[str, Any]]:
    """Instructions with a polite and an impolite wording of one answer, and the plain answer."""
    rows = []
    for file in sorted((data / "instruction_preference").glob("*.json")):
        for row in json.loads(file.read_text()):
            text = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
            if row["chosen"] != row["rejected"]:
                given = {"prompt": text, "chosen": row["chosen"], "rejected": row["rejected"], "plain": row["output"]}
                rows.append(given)
    return rows


def last_number(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where the last number of the completion is the answer, else 0."""
    found = [re.findall(r"-?\d+", text) for text in completions]
    return [float(bool(n) and n[-1] == a) for n, a in zip(found, answer, strict=True)]
