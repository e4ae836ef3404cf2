"""Sampling ahead of learning beside waiting: wall time of the same GRPO run with a slow reward, at k = 0, 1, 2.

    python benchmarks/asynchronous.py [--iterations 24] [--reward SECONDS] [--seeds 0 1 2]

The reward sleeps, as a judge or a sandbox would let the machine idle: as long as a batch takes to sample, which a
run without sleep measures first, or `--reward` seconds. Every run samples in another process. The runs of one seed
take turns, so that whatever else the machine does meets all. It prints seconds, their ratio to k = 0, and the
held-out reward at the end; the same numbers go to docs/results/asynchronous-speed.json, from which
tools/results/asynchronous_page.py writes the page. It ends with status 1 where neither k = 1 nor k = 2 is 1.6 times
as fast as k = 0 on average over the seeds, or the reward of k = 1 or 2 is more than two standard errors of the
difference below that of k = 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from steersman.assets import openings, story_model
from steersman.atomic import write_atomic
from steersman.jsonl import read_jsonl
from steersman.verbs import rl
from steersman.verbs.on_policy_recipes import RECIPES

REWARD = """
import time

def slow(prompts, completions):
    time.sleep({seconds})
    return [c.count("the") / 4 for c in completions]
"""
OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "asynchronous-speed.json"


def run(folder: Path, ahead: int, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One run with the folder's reward: the seconds of its iterations, those that the learner waited for samples, and
    its last held-out reward."""
    recipe = RECIPES["grpo"].model_validate(
        {
            "model": {"path": str(story_model())},
            "data": {"path": str(folder / "prompts.jsonl")},
            "reward": {"parts": {"the": {"function": f"{folder / 'reward.py'}:slow"}}},
            "rollout": {"prompts": 4, "samples": 8, "max_new_tokens": 64, "engine": "process", "ahead": ahead},
            "optimizer": {"lr": 1e-4},
            "iterations": given.iterations,
            "run": {"dir": str(folder / f"k{ahead}-seed{seed}-{time.monotonic_ns()}"), "seed": seed, "threads": 1,
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
    parser.add_argument("--reward", type=float, help="seconds a batch; as long as sampling if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    if given.iterations < 2:
        parser.error("--iterations: the first is not counted, so at least 2 are needed")
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in openings()))
        (folder / "reward.py").write_text(REWARD.format(seconds=0.0))
        alone = run(folder, 0, given.seeds[0], given)["waited"] / (given.iterations - 1)
        seconds = alone if given.reward is None else given.reward
        print({"sampling, s a batch": round(alone, 3), "reward, s a batch": round(seconds, 3)}, flush=True)
        (folder / "reward.py").write_text(REWARD.format(seconds=seconds))
        for seed in given.seeds:
            for ahead in (0, 1, 2):
                found.append(run(folder, ahead, seed, given))
    for one in found:
        base = next(x for x in found if x["seed"] == one["seed"] and x["ahead"] == 0)
        one["faster"] = base["seconds"] / one["seconds"]
        print({k: round(v, 3) for k, v in one.items()})
    write_atomic(OUT, json.dumps({"sampling": alone, "reward": seconds, "runs": found}, indent=1) + "\n")
    wrong = list(broken_claims(found))
    print("\n".join(wrong) or "as claimed")
    sys.exit(bool(wrong))


def broken_claims(found: list[dict[str, Any]]) -> Iterator[str]:
    """What the docstring says of the runs and does not hold."""
    by = {k: [one for one in found if one["ahead"] == k] for k in (0, 1, 2)}
    faster = {k: mean(one["faster"] for one in by[k]) for k in (1, 2)}
    if max(faster.values()) < 1.6:
        yield f"k = 1 is {faster[1]:.2f} and k = 2 {faster[2]:.2f} times as fast as k = 0, and 1.6 is claimed"
    for k in (1, 2):
        apart = [b["reward"] - a["reward"] for a, b in zip(by[0], by[k], strict=True)]
        error = stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("inf")
        if mean(apart) < -2 * error:
            yield f"the reward at k = {k} is {-mean(apart):.3f} below that of k = 0; standard error {error:.3f}"


if __name__ == "__main__":
    main()
