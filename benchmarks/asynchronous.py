"""Sampling ahead of learning beside waiting: wall time of the same GRPO run with a slow reward, at k = 0, 1, 2.

    python benchmarks/asynchronous.py [--iterations 24] [--reward 0.6] [--seeds 0 1 2]

The reward sleeps for `--reward` seconds a batch, as a judge or a sandbox would; choose it about as long as sampling
takes: the column `waited` of k = 0 without it.
Every run samples in another process. The runs of one seed take turns, so that
whatever else the machine does meets all. It prints seconds, their ratio to k = 0, and the held-out reward at the end;
the same numbers go to docs/results/asynchronous.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from steersman.assets import openings, story_model
from steersman.run.folder import write_atomic
from steersman.run.log import read_jsonl
from steersman.verbs import rl
from steersman.verbs.on_policy_recipes import RECIPES

REWARD = """
import time

def slow(prompts, completions):
    time.sleep({seconds})
    return [c.count("the") / 4 for c in completions]
"""
OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "asynchronous.json"


def run(folder: Path, ahead: int, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One run: the seconds of its iterations, those that the learner waited for samples, its last held-out reward."""
    recipe = RECIPES["grpo"].model_validate(
        {
            "model": {"path": str(story_model())},
            "data": {"path": str(folder / "prompts.jsonl")},
            "reward": {"parts": {"the": {"function": f"{folder / 'reward.py'}:slow"}}},
            "rollout": {"prompts": 4, "samples": 8, "max_new_tokens": 64, "engine": "process", "ahead": ahead},
            "optimizer": {"lr": 1e-4},
            "iterations": given.iterations,
            "run": {"dir": str(folder / f"k{ahead}-seed{seed}"), "seed": seed, "threads": 1,
                    "eval_every": given.iterations, "save_every": given.iterations},
        }
    )  # fmt: skip
    rl.run(recipe)
    rows = [row for row in read_jsonl(Path(recipe.run.dir) / "metrics.jsonl") if "time/iteration" in row]
    return {
        "ahead": ahead, "seed": seed, "seconds": sum(row["time/iteration"] for row in rows[1:]),
        "waited": sum(row["time/rollout"] for row in rows[1:]), "reward": rows[-1]["held_out/reward/total"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--reward", type=float, default=0.6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "reward.py").write_text(REWARD.format(seconds=given.reward))
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in openings()))
        for seed in given.seeds:
            for ahead in (0, 1, 2):
                found.append(run(folder, ahead, seed, given))
    for one in found:
        base = next(x for x in found if x["seed"] == one["seed"] and x["ahead"] == 0)
        one["faster"] = base["seconds"] / one["seconds"]
        print({k: round(v, 3) for k, v in one.items()})
    write_atomic(OUT, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
