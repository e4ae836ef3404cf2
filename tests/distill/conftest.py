"""Two tiny models, a student and a teacher, and settings of a short run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from letter_models import save_mini, write_jsonl

from steersman.train import session

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(session, "write_report", lambda folder: folder / "report.html")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """A student and a teacher of the same tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    return save_mini(folder / "student", 0), save_mini(folder / "teacher", 1)


@pytest.fixture
def settings(tmp_path, models) -> dict:
    words = ["the cat", "a dog sat", "we", "look at", "no", "she said so", "hm,", "it is"]
    rows = [{"prompt": w, "completion": f"{w[-1]} is {i}a", "hint": "bb"} for i, w in enumerate(words)]
    return {
        "model": {"path": str(models[0])},
        "teacher": {"path": str(models[1])},
        "data": {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows))},
        "train": {"batch_size": 4, "epochs": 4},
        "rollout": {"max_new_tokens": 8, "held_out": 8},
        "optimizer": {"lr": 1e-2},
        "run": {"dir": str(tmp_path / "run"), "threads": 1, "eval_every": 8, "save_every": 3},
    }
