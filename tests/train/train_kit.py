"""Tiny models on disk, data files and recipes, for the tests of the loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from letter_models import LETTERS, WORDS, letters, rows_of, write_jsonl
from tiny_models import tiny_model

from steersman.guards.user_code import CtrlCError
from steersman.recipe.on_policy import OnPolicyRecipe
from steersman.verbs.on_policy_recipes import RECIPES

REWARDS = """
def count_a(prompts, completions):
    return [c.count("a") / 4 for c in completions]

def per_token(prompts, completions, samples):
    return [[0.1 * (i % 7) for i in s.ids] for s in samples]

def nan(prompts, completions):
    return [float("nan")] * len(completions)

def short(prompts, completions):
    return [0.0] * (len(completions) - 1)

def broken(prompts, completions):
    return [1 / 0 for _ in completions]

CALLS = []

def broken_later(prompts, completions):
    CALLS.append(1)
    return [1 / 0 if len(CALLS) > 4 else len(c) for c in completions]

def constant(prompts, completions):
    return [1.0] * len(completions)
"""


def save_tiny(folder: Path, family: str = "llama", scale: float = 1.0, seed: int = 0, **tokenizer: Any) -> Path:
    """A random model of the family, whose vocabulary is the letters'."""
    tiny_model(family, vocab=len(LETTERS), seed=seed, scale=scale).save_pretrained(folder)
    letters(**tokenizer).save_pretrained(folder)
    return folder


def prompts_file(folder: Path, count: int = 12) -> Path:
    return write_jsonl(folder / "prompts.jsonl", [{"prompt": WORDS[i % 12] + " " * (i // 12)} for i in range(count)])


def rewards_file(folder: Path) -> Path:
    path = folder / "rewards.py"
    path.write_text(REWARDS)
    return path


def merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`extra` laid over `base`; keys with dots reach into sections."""
    out = json.loads(json.dumps(base))
    for key, value in extra.items():
        *path, last = key.split(".")
        spot = out
        for name in path:
            if spot.get(name) is None:
                spot[name] = {}
            spot = spot[name]
        spot[last] = value
    return out


def settings(folder: Path, model: Path, reward: str = "count_a") -> dict[str, Any]:
    """A recipe's plain settings: 4 prompts, 2 samples, 8 tokens."""
    return {
        "model": {"path": str(model)},
        "data": {"path": str(prompts_file(folder))},
        "reward": {"parts": {"score": {"function": f"{rewards_file(folder)}:{reward}"}}},
        "rollout": {"prompts": 4, "samples": 2, "max_new_tokens": 8, "held_out": 3},
        "optimizer": {"lr": 3e-3},
        "iterations": 2,
        "run": {"dir": str(folder / "run"), "threads": 1, "eval_every": 2, "save_every": 1},
    }


def recipe(name: str, base: dict[str, Any], **extra: Any) -> OnPolicyRecipe:
    """The algorithm's recipe; `__` in a name stands for a dot."""
    return RECIPES[name].model_validate(merge(base, {k.replace("__", "."): v for k, v in extra.items()}))


def rows(run: Path) -> list[dict[str, Any]]:
    return rows_of(run / "metrics.jsonl")


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics without what measures time."""
    return {k: v for k, v in row.items() if k != "seconds" and not k.startswith(("time/", "throughput"))}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def cut_after(calls: int):
    """A reward in whose call Ctrl-C comes, so in the middle of an iteration, after so many calls."""
    left = [calls]

    def score(prompts, completions):
        left[0] -= 1
        if left[0] < 0:
            raise CtrlCError
        return [c.count("a") / 4 for c in completions]

    return score
