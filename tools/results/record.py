"""Runs the three recorded results of docs/results and writes their numbers, curves and samples.

    python tools/results/record.py sentiment --data ../shared/data --out runs/results --seeds 0 1 2
    python tools/results/record.py arguments --data ../shared/data --out runs/results --seeds 0 1 2
    python tools/results/record.py politeness --data ../shared/data --out runs/results --seeds 0 1 2

Every stage is a verb's own `run` with a recipe that is printed into its run folder; a stage that has finished is
not run again. `--docs docs/results` writes `<name>.json` and `<name>.png` there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recording import OPENINGS, over_seeds, plain_axes, plt, rows_of, verb

from steersman.jsonl import jsonl_text, read_jsonl
from steersman.reward.rules import BUILTINS
from steersman.verbs import reward_model, rl, sft
from steersman.verbs.generate import GenerateRecipe
from steersman.verbs.generate import run as generate
from steersman.verbs.on_policy_recipes import RECIPES


def ppo(folder: Path, seed: int, model: str, data: dict, parts: dict, rollout: dict, **more: Any) -> dict[str, Any]:
    """PPO with the settings that all recorded runs share."""
    return verb(
        rl, RECIPES["ppo"], folder, seed,
        {
            "model": {"path": model},
            "data": data,
            "reward": {"parts": parts, "normalise": True},
            "rollout": {"prompts": 32, "samples": 2, "held_out": 64, **rollout},
            "algorithm": {"beta": 0.1, "epochs": 2, "minibatches": 4},
            "optimizer": {"lr": 3e-4, "warmup": 4},
            "critic": {"optimizer": {"lr": 1e-3}},
            "iterations": 50,
            "run": {"eval_every": 5},
            "health": {"expect_eos": False},
            **more,
        },
    )  # fmt: skip


def sentiment(data: Path, out: Path, seed: int) -> dict[str, dict[str, Any]]:
    """stories260k: PPO toward VADER's compound score, and toward a reward model of pairs that it labelled."""
    model, prompts = str(data / "stories260k/hf"), {"path": str(data / "tinystories"), **OPENINGS}
    rollout = {"max_new_tokens": 48, "eos_token_id": [1, 2]}
    direct = ppo(out / "rule", seed, model, prompts, {"vader": {"builtin": "vader_sentiment"}}, rollout)
    table = out / "pairs.jsonl"
    if not table.exists():
        _label_pairs(model, prompts, rollout, seed, table)
    judge = verb(
        reward_model, reward_model.RewardModelRecipe, out / "reward", seed,
        {
            "model": {"path": model},
            "data": {"path": str(table), "held_out": 0.15},
            "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup": 5},
            "train": {"epochs": 3, "batch_size": 32},
            "run": {"eval_every": 10},
        },
    )  # fmt: skip
    learned = ppo(
        out / "model", seed, model, prompts,
        {"reward_model": {"model": judge["model"]}, "vader": {"builtin": "vader_sentiment", "weight": 0.0}}, rollout,
    )  # fmt: skip
    return {"rule": direct, "reward": judge, "model": learned}


def _label_pairs(model: str, prompts: dict, rollout: dict, seed: int, table: Path) -> None:
    """Four responses per opening; the best against the worst by VADER's score, the middle two likewise."""
    drawn = table.with_name("drawn.jsonl")
    recipe = {
        "model": {"path": model}, "data": prompts, "out": str(drawn),
        "rollout": {"prompts": 1, "samples": 4, "held_out": 0, **rollout}, "run": {"seed": seed + 100, "threads": 1},
    }  # fmt: skip
    table.parent.mkdir(parents=True, exist_ok=True)
    generate(GenerateRecipe.model_validate(recipe))
    rows = read_jsonl(drawn)
    score = BUILTINS["vader_sentiment"](
        prompts=[r["prompt"] for r in rows], completions=[r["completion"] for r in rows]
    )
    pairs = []
    for start in range(0, len(rows), 4):
        order = sorted(range(start, start + 4), key=lambda i: score[i])
        for low, high in ((order[0], order[3]), (order[1], order[2])):
            if score[high] - score[low] > 0.1:
                chosen, rejected = rows[high]["completion"], rows[low]["completion"]
                pairs.append({"prompt": rows[start]["prompt"], "chosen": chosen, "rejected": rejected})
    table.write_text(jsonl_text(pairs))


def arguments(data: Path, out: Path, seed: int) -> dict[str, dict[str, Any]]:
    """A reward model of convincing arguments; three whole debates held out, and the length rule beside it."""
    pairs = data / "ukp_convarg1/strict_pairs"
    held = ["ban-plastic-water-bottles*", "evolution-vs-creation*", "should-physical-education*"]
    return {
        "reward": verb(
            reward_model, reward_model.RewardModelRecipe, out / "reward", seed,
            {
                "model": {"path": str(data / "stories260k/hf")},
                "data": {
                    "path": str(pairs), "held_out_files": [str(pairs / h) for h in held],
                    "on_too_long": "truncate", "max_length": 256, "max_prompt_tokens": 32,
                },
                "train": {"max_steps": 140, "batch_size": 32},
                "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup": 20},
                "run": {"eval_every": 20},
            },
        )
    }  # fmt: skip


def politeness(data: Path, out: Path, seed: int) -> dict[str, dict[str, Any]]:
    """SFT -> reward model -> PPO on polite over impolite answers; a second reward model only watches."""
    source = {"path": str(data / "instruction_preference"), "on_bad_row": "skip", "on_too_long": "drop"}
    start = verb(
        sft, sft.SFTRecipe, out / "sft", seed,
        {
            "model": {"path": str(data / "stories260k/hf")},
            "data": {**source, "held_out": 0.1},
            "train": {"epochs": 6, "batch_size": 16},
            "optimizer": {"lr": 2e-3, "schedule": "cosine", "warmup": 20},
            "run": {"eval_every": 50},
        },
    )  # fmt: skip
    judges = {
        name: verb(
            reward_model, reward_model.RewardModelRecipe, out / name, seed + 50 * number,
            {
                "model": {"path": str(data / "stories260k/hf")},
                "data": {**source, "held_out": 0.15},
                "train": {"epochs": 4, "batch_size": 16},
                "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup": 10},
                "run": {"eval_every": 25},
            },
        )
        for number, name in enumerate(("reward", "watcher"))
    }  # fmt: skip
    parts = {
        "reward_model": {"model": judges["reward"]["model"]},
        "watcher": {"model": judges["watcher"]["model"], "weight": 0.0},
    }
    tuned = ppo(
        out / "ppo", seed, start["model"], {**source, "held_out": 64, "max_prompt_tokens": 160}, parts,
        {"max_new_tokens": 48},
    )  # fmt: skip
    return {"sft": start, **judges, "ppo": tuned}


RESULTS = {"sentiment": sentiment, "arguments": arguments, "politeness": politeness}


def collect(name: str, found: dict[int, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Each stage's numbers over the seeds: mean, standard deviation, and the values."""
    table: dict[str, Any] = {"result": name, "seeds": sorted(found)}
    for stage in next(iter(found.values())):
        keys = [k for k, x in found[min(found)][stage].items() if isinstance(x, (int, float)) and k != "finished"]
        table[stage] = {}
        for key in keys:
            table[stage][key] = over_seeds([found[seed][stage].get(key, float("nan")) for seed in sorted(found)])
        findings = {seed: found[seed][stage].get("findings") for seed in sorted(found)}
        if any(findings.values()):
            table[stage]["findings"] = findings
    return table


def draw(name: str, out: Path, stages: dict[str, list[str]], seeds: list[int], file: Path) -> None:
    """One panel per metric, a line per stage and seed."""
    metrics = list(dict.fromkeys(m for wanted in stages.values() for m in wanted))
    figure, axes = plt.subplots(1, len(metrics), figsize=(3.4 * len(metrics), 2.9), layout="constrained")
    for axis, metric in zip([axes] if len(metrics) == 1 else axes, metrics, strict=True):
        for colour, stage in zip(("#1f5f8b", "#c2571a", "#2e8b57"), stages, strict=False):
            for seed in seeds:
                rows = rows_of(out / f"seed-{seed}" / stage)
                points = [(r["step"], r[metric]) for r in rows if metric in r]
                if points:
                    axis.plot(
                        *zip(*points, strict=True), color=colour, lw=1.2, label=stage if seed == seeds[0] else None
                    )
        plain_axes(axis, metric)
    (axes if len(metrics) == 1 else axes[0]).legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


CURVES = {
    "sentiment": {
        stage: ["held_out/reward/vader", "held_out/kl", "held_out/perplexity", "held_out/distinct2"]
        for stage in ("rule", "model")
    },
    "arguments": {"reward": ["held_out/accuracy", "held_out/accuracy_longer_wins", "held_out/loss"]},
    "politeness": {
        "ppo": ["held_out/reward/reward_model", "held_out/reward/watcher", "held_out/kl", "held_out/perplexity"]
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", choices=RESULTS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    out = args.out / args.result
    found = {seed: RESULTS[args.result](args.data, out / f"seed-{seed}", seed) for seed in args.seeds}
    table = collect(args.result, found)
    print(json.dumps(table, indent=1))
    if args.docs is not None:
        args.docs.mkdir(parents=True, exist_ok=True)
        (args.docs / f"{args.result}.json").write_text(json.dumps(table, indent=1) + "\n")
        draw(args.result, out, CURVES[args.result], args.seeds, args.docs / f"{args.result}.png")


if __name__ == "__main__":
    main()
