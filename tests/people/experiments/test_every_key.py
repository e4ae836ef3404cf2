"""A key that a verb of this room accepts is a key that it reads."""

from __future__ import annotations

import sys
from pathlib import Path

from judging_kit import ab_rows, append, choices, settings
from letter_models import write_jsonl

sys.path.insert(0, str(Path(__file__).parents[2] / "train"))
from test_every_key_is_read import SOMETIMES as ELSEWHERE  # type: ignore
from test_every_key_is_read import read_by  # type: ignore

ASKED_FOR = ("kto.", "sft.", "ppo.", "dpo.", "model.", "run.", "rollout.recompute_logp", "experiment.")
"""Sections that are handed to the verbs, which have a test of their own; an experiment is `ab`'s."""
SOMETIMES = {"mix.anchors", "health"}


def unread(verb: str, values: dict, monkeypatch, sometimes: set[str] = frozenset()) -> set[str]:  # type: ignore
    from steersman.verb_table import VERBS

    kind = VERBS[verb].recipe_class(None, [])
    keys, read = read_by(verb, kind.model_validate(values), monkeypatch)
    declared = kind.unread_keys()
    passed = (*ASKED_FOR, *(f"{section}." for section in declared))
    return {k for k in keys - read - declared - ELSEWHERE - SOMETIMES - set(sometimes) if not k.startswith(passed)}


def test_ab_and_leaderboard(tmp_path, monkeypatch):
    rows = ab_rows(40, 0.6, "control", "treatment")
    rows += [{"user": f"v{i}", "arm": "control" if i % 2 else "treatment", "latency": 1.0} for i in range(20)]
    path = str(write_jsonl(tmp_path / "o.jsonl", rows))
    guard = {"latency": {"better": "lower", "most": 5.0, "allowed": 0.5}}
    experiment = {"guards": guard}
    never = {"experiment.salt"}  # for whoever assigns users
    assert unread("ab", {"file": path, "experiment": experiment}, monkeypatch, never) == set()
    only = str(write_jsonl(tmp_path / "j.jsonl", ab_rows(40, 0.6, "a", "b")))
    assert unread("leaderboard", {"file": only, "draws": 20}, monkeypatch) == set()


def test_wheel(tmp_path, mini_model, monkeypatch):
    gold = [{**row, "expected": row["choice"]} for row in choices(40, seed=5)]
    append(tmp_path / "inbox", "day", [*choices(250, seed=4), *gold])
    idle = unread("wheel", settings(tmp_path, mini_model), monkeypatch)
    assert not idle, sorted(idle)
