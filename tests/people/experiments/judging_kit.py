"""Judgements of raters with a hidden preference: they like the letter a and dislike e."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from letter_models import WORDS

GOOD, BAD = "aa ba ca.", "ee be ce."


def choices(count: int, *, seed: int = 0, flipped: bool = False, models: tuple[str, str] | None = None, **more: Any):
    """Rows of pairs of an answer with the letter a and one with e, sides at random, by ten raters."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        word = rng.choice("bcdfg") + rng.choice("bcdfgh")
        good, bad = (GOOD.replace("b", word), BAD.replace("b", word))
        swapped = rng.random() < 0.5
        first = swapped if not flipped else not swapped
        rows.append(
            {
                "id": f"{seed}-{i}", "user": f"r{i % 10}", "time": 1000 * seed + i,
                "prompt": f"{rng.choice(WORDS)} {word}",
                "answers": [bad, good] if swapped else [good, bad], "choice": "second" if first else "first",
                "seconds": 4.0, **({"models": list(models)} if models else {}), **more,
            }
        )  # fmt: skip
    return rows


def ab_rows(count: int, rate: float, control: str, treatment: str, seed: int = 9) -> list[dict[str, Any]]:
    """Rows of an A/B test in which people choose the treatment at this rate, one judgement each."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        models = [control, treatment] if rng.random() < 0.5 else [treatment, control]
        won = models.index(treatment if rng.random() < rate else control)
        rows.append(
            {
                "id": f"ab{seed}-{i}", "user": f"u{seed}-{i}", "time": 10**6 * seed + i, "prompt": "hm,",
                "answers": ["a", "b"], "models": models, "choice": ("first", "second")[won],
            }
        )  # fmt: skip
    return rows


def append(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def settings(folder: Path, model: Path, run: str = "run", **extra: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "judgements": {"folder": str(folder / "inbox"), "at_least": 60, "held_out": 0.3},
        "dpo": {"train": {"batch_size": 8, "epochs": 2}, "optimizer": {"lr": 3e-3}},
        "rollout": {"held_out": 6, "max_new_tokens": 8, "max_batch": 4},
        "gates": {"human/accuracy": {"at_least": 0.5, "sure": True}, "length": {"at_most": 3.0}},
        "experiment": {"share": 0.2},
        "run": {"dir": str(folder / run), "threads": 1, "save_every": 5, "eval_every": 100},
        **extra,
    }
