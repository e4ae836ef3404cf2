"""Tiny data of each shape that the reward verb knows, and recipes that run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from letter_models import write_jsonl

WORDS = ["yes it is.", "no", "a cat, a dog, and two", "ok", "look there", "e", "so she said", "hm", "what?", "go on"]


def prompt(i: int) -> str:
    return "which" + "?" * (i % 4) + "abcdefghijkl"[i % 12]


def word(i: int) -> str:
    return WORDS[i % 10] + " a" * (i // 10)


def rows(kind: str) -> list[dict[str, Any]]:
    if kind in ("preference", "gating"):
        votes = [[1, 1, 0], [1, 1, 1], [1, 0.5, 0]]
        return [{"prompt": prompt(i), "chosen": word(i), "rejected": WORDS[(i + 3) % 10], "votes": votes[i % 3]}
                for i in range(30)]  # fmt: skip
    if kind == "ranking":
        return [
            {"prompt": prompt(i), "responses": [word(i + k) for k in range(count)], "ranks": [0, 1, 1, 3][:count]}
            for i in range(24)
            for count in [2 + i % 3]
        ]
    if kind == "rating":
        return [{"prompt": prompt(i), "completion": word(i), "score": 10 + word(i).count("a")} for i in range(30)]
    if kind == "attributes":
        return [{"prompt": prompt(i), "completion": word(i), "a": word(i).count("a"), "e": None if i % 5 == 0 else
                 100 + 10 * word(i).count("e")} for i in range(30)]  # fmt: skip
    if kind == "feedback":
        return [{"prompt": prompt(i), "completion": word(i), "label": "a" in word(i), "source": "xy"[i % 2]}
                for i in range(30)]  # fmt: skip
    assert kind == "steps"
    return [
        {"prompt": prompt(i), "steps": [WORDS[i % 10], WORDS[(i + 1) % 10]][:count], "labels": [1, 0.25][:count]}
        for i in range(30)
        for count in [1 + i % 2]
    ]


def settings(folder: Path, model: Path, kind: str, run: str = "run", **train: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"path": str(write_jsonl(folder / f"{kind}.jsonl", rows(kind))), "held_out": 6}
    if kind in ("preference", "ranking", "gating"):
        data["ties"] = "keep"
    if kind == "attributes":
        data["scores"] = ["a", "e"]
    return {
        "model": {"path": str(model)},
        "data": data,
        "stage": "gating" if kind == "gating" else "train",
        "train": {"batch_size": 4, "epochs": 3, **train},
        "optimizer": {"lr": 0.01, "schedule": "linear", "warmup": 3},
        "evaluation": {"draws": 100},
        "run": {"dir": str(folder / run), "threads": 1, "save_every": 2, "eval_every": 4, "micro_tokens": 60},
    }
