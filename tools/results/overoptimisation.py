"""What helps against over-optimisation: seven ways on three tasks, gold against KL.

    steersman quickstart --dir runs/results/flywheel/base --iterations 1 --sft_samples 3 --pair_samples 6
    python tools/results/overoptimisation.py run --data ../shared/data --seeds 0 1 2 --minutes 9
    python tools/results/overoptimisation.py table --seeds 0 1 2

`run` makes what is missing and begins no further cell after `--minutes` of CPU time; the same command goes on. Every
task has a gold judge that labels few pairs, a reward model of these pairs (the proxy) that is optimised, and a second
one of as many other pairs (the held-out judge) that only looks:

- happy: stories260k continues story openings; gold is VADER's score; RLOO.
- polite: stories260k after SFT on `instruction_preference`; gold is a reward model of all its pairs, which also knows
  that a stub is worse than either answer; RLOO.
- arena: five rounds of `steersman arena` against the first model and one that gold taught; gold is the
  happy-story judge.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from overoptimisation_page import ARMS, TASKS, write_page
from preference import label_pairs
from recording import OPENINGS, finished, options, run_cells, verb

from steersman.data import DataConfig, preferences
from steersman.flywheel import arena
from steersman.jsonl import jsonl_text, read_jsonl
from steersman.judge.scored import Scorer
from steersman.reward import RewardPart
from steersman.verbs import generate, reward_model, rl, sft
from steersman.verbs.on_policy_recipes import RECIPES

PAIRS, ITERATIONS, EVERY, ROUNDS = 120, 32, 4, 5
BUDGET = {"happy": 8.0, "polite": 8.0, "arena": 15.0}
"""Nats per answer that the arm with a budget may go from the start."""
PESSIMISM, LATENTS, NAT, VARIETY = 1.0, 16, 0.1, 4.0
ENDS = {"happy": {"eos_token_id": [1, 2]}, "polite": {}}
ARENA = Path("recipes/results/flywheel-arena.yaml")
BASE = Path("runs/results/flywheel/base")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(jsonl_text(rows))
    return path


def first_words(answer: list[dict[str, str]], number: int) -> list[dict[str, str]]:
    """The answer's first words alone."""
    (said,) = answer
    return [{**said, "content": " ".join(said["content"].split()[:number]) + "."}]


def judged(folder: Path, seed: int, model: str, pairs: Path, **train: Any) -> str:
    """The path of a reward model of the pairs."""
    values = {
        "model": {"path": model}, "data": {"path": str(pairs), "on_too_long": "drop"},
        "train": {"epochs": 4, "batch_size": 16, "keep": "last", **train},
        "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup": 4}, "run": {"eval_every": 1000},
    }  # fmt: skip
    return verb(reward_model, reward_model.RewardModelRecipe, folder, seed, values)["model"]


class Start:
    """What the arms of a task share: the first model, its prompts, the gold judge, and pairs in two halves."""

    def __init__(self, task: str, data: Path, out: Path) -> None:
        self.task, self.out, self.base = task, out / "start" / task, str(data / "stories260k/hf")
        if task == "happy":
            table = self.out / "pairs.jsonl"
            if not table.exists():
                label_pairs(self.base, data, table)
            self.model, self.gold = self.base, {"builtin": "vader_sentiment"}
            self.prompts: dict[str, Any] = {"path": str(data / "tinystories"), **OPENINGS}
            pairs = rows_of(table)
        elif task == "polite":
            pairs = self._polite(data)
        else:
            self.model, self.gold = str(BASE / "1-sft/model"), {"builtin": "happy_story"}
            pairs = rows_of(BASE / "pairs.jsonl")
        half = PAIRS if task != "arena" else len(pairs) // 2
        self.first, self.other = (
            write_rows(self.out / f"{name}.jsonl", pairs[i * half : (i + 1) * half])
            for i, name in enumerate(("proxy", "other"))
        )

    def _polite(self, data: Path) -> list[dict[str, Any]]:
        source = {"path": str(data / "instruction_preference"), "on_bad_row": "skip"}
        pairs = [
            {"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected}
            for e in preferences(DataConfig(**source)).train
        ]
        stubs = [
            {**p, "chosen": p["rejected"], "rejected": first_words(p["chosen"], 1 + i % 4)}
            for i, p in enumerate(pairs)
        ]
        self.prompts = {**source, "on_too_long": "drop", "held_out": 64, "max_prompt_tokens": 160}
        taught = {
            "model": {"path": self.base}, "data": {**source, "on_too_long": "drop"},
            "train": {"epochs": 4, "batch_size": 16}, "run": {"eval_every": 1000},
            "optimizer": {"lr": 2e-3, "schedule": "cosine", "warmup": 20},
        }  # fmt: skip
        self.model = verb(sft, sft.SFTRecipe, self.out / "sft", 0, taught)["model"]
        known = write_rows(self.out / "gold.jsonl", pairs + stubs)
        self.gold = {"model": judged(self.out / "gold", 99, self.base, known, epochs=3)}
        return pairs

    def taught(self) -> str:
        """The arena's opponent: the first model after fine-tuning on the answers that gold chose."""
        values = {
            "model": {"path": self.model},
            "data": {"path": str(BASE / "pairs.jsonl"), "columns": {"completion": "chosen"}, "on_too_long": "drop"},
            "train": {"epochs": 1, "batch_size": 32}, "run": {"eval_every": 1000},
            "optimizer": {"lr": 5e-4, "schedule": "linear"},
        }  # fmt: skip
        return verb(sft, sft.SFTRecipe, self.out / "taught", 0, values)["model"]

    def judges(self, arm: str, seed: int, pairs: Path, name: str = "") -> tuple[dict[str, Any], str]:
        """What is optimised, as parts of a reward, and the path of the held-out judge."""
        into, model = self.out / f"seed-{seed}", self.base if self.task != "arena" else self.model
        other = judged(into / "other", seed + 50, model, self.other)
        if arm == "ensemble":
            path = judged(into / "ensemble", seed, model, pairs, heads=5)
            return {"proxy": {"model": path, "pessimism": PESSIMISM}}, other
        if arm == "bottleneck":
            path = judged(into / "bottleneck", seed, model, pairs, bottleneck=LATENTS)
            return {"proxy": {"model": path, "pessimism": NAT}}, other
        proxy = {"proxy": {"model": judged(into / f"proxy{name}", seed, model, pairs)}}
        more = {"variety": {"builtin": "diversity", "weight": VARIETY}} if arm == "diversity" else {}
        return proxy | more, other


def trained(start: Start, arm: str, seed: int, folder: Path, iterations: int, **more: Any) -> dict[str, Any]:
    """RLOO toward the arm's reward; gold and the held-out judge look."""
    parts, other = start.judges(arm, seed, more.pop("pairs", start.first), more.pop("name", ""))
    parts |= {"gold": {**start.gold, "weight": 0.0}, "other": {"model": other, "weight": 0.0}}
    stop = {"early stop": {"judge": "other", "patience": 2}, "kl budget": {"judge": "other", "patience": 99}}.get(arm)
    if arm == "kl budget":
        stop = {**(stop or {}), "max_kl": BUDGET[start.task]}
    values = {
        "model": {"path": start.model}, "reference": start.model, "data": start.prompts,
        "reward": {"parts": parts, "normalise": True},
        "rollout": {"prompts": 12, "samples": 4, "max_new_tokens": 32, "held_out": 64, **ENDS[start.task]},
        "algorithm": {"beta": 0.02}, "optimizer": {"lr": 1e-3, "warmup": 4}, "iterations": iterations,
        "run": {"eval_every": EVERY, "save_every": iterations}, "health": {"expect_eos": False}, "stop": stop, **more,
    }  # fmt: skip
    return verb(rl, RECIPES["rloo"], folder, seed, values)


def refreshed(start: Start, seed: int, folder: Path) -> dict[str, Any]:
    """Half the labels before, half after half of the iterations, on what the policy says then."""
    pairs = rows_of(start.first)[: PAIRS // 2]
    early = write_rows(folder / "early.jsonl", pairs)
    half = trained(start, "plain", seed, folder / "half", ITERATIONS // 2, pairs=early, name="-half")
    later = folder / "later.jsonl"
    if not later.exists():
        write_rows(later, pairs + newly_labelled(start, seed, half["model"], folder))
    return trained(
        start, "plain", seed, folder / "rest", ITERATIONS // 2, pairs=later, name="-refreshed",
        model={"path": half["model"]},
    )  # fmt: skip


def newly_labelled(start: Start, seed: int, model: str, folder: Path) -> list[dict[str, Any]]:
    """Pairs of the policy's own answers, the one with more gold chosen."""
    drawn = folder / "drawn.jsonl"
    recipe = {
        "model": {"path": model}, "data": {**start.prompts, "held_out": 0, "limit": PAIRS}, "out": str(drawn),
        "rollout": {"samples": 2, "held_out": 0, "max_new_tokens": 32, **ENDS[start.task]},
        "run": {"seed": seed + 7, "threads": 1},
    }  # fmt: skip
    generate.run(generate.GenerateRecipe.model_validate(recipe))
    rows = [r for r in rows_of(drawn) if r["completion"].strip()]
    scorer = Scorer({"gold": RewardPart.model_validate(start.gold)})
    gold = scorer([r["prompt"] for r in rows], [r["completion"] for r in rows])["gold"]
    pairs: list[dict[str, Any]] = []
    for i in range(1, len(rows)):
        if rows[i]["prompt"] == rows[i - 1]["prompt"] and gold[i] != gold[i - 1] and len(pairs) < PAIRS // 2:
            high, low = (i, i - 1) if gold[i] > gold[i - 1] else (i - 1, i)
            pairs.append(
                {"prompt": rows[i]["prompt"], "chosen": rows[high]["completion"], "rejected": rows[low]["completion"]}
            )
    return pairs


def cell(task: str, arm: str, seed: int, data: Path, out: Path) -> None:
    """One arm of one task with one seed, in a folder of its own."""
    start, folder = Start(task, data, out), out / task / arm.replace(" ", "-") / f"seed-{seed}"
    if task == "arena":
        battled(start, arm, seed, folder)
    elif arm == "refreshed":
        (folder / "summary.json").write_text(json.dumps(refreshed(start, seed, folder)))
    else:
        trained(start, arm, seed, folder, ITERATIONS)


def battled(start: Start, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Five rounds of the recorded arena, made smaller, under the arm's judge."""
    values = yaml.safe_load(ARENA.read_text())
    parts, other = start.judges(arm, seed, start.first)
    values["judge"] = {"reward": parts}
    values["watch"] = {"gold": start.gold, "other": {"model": other}}
    values["opponents"] = {"start": start.model, "taught": start.taught()}
    values["data"]["held_out"] = values["rollout"]["held_out"] = 64
    values["rollout"] |= {"prompts": 32, "max_new_tokens": 48}
    values["ppo"] |= {"iterations": 4, "prompts": 16}
    values |= {"rounds": ROUNDS, "draws": 20}
    if arm in ("early stop", "kl budget"):
        values["stop"] = {"judge": "other", "patience": 1 if arm == "early stop" else ROUNDS}
    if arm == "kl budget":
        values["stop"]["max_kl"] = BUDGET["arena"]
    if arm == "refreshed":
        values["refresh"] = {
            "by": "gold", "first": [str(start.first)], "train": {"epochs": 1, "batch_size": 16, "keep": "last"},
            "optimizer": {"lr": 5e-4, "schedule": "linear"},
        }  # fmt: skip
    return verb(arena, arena.ArenaRecipe, folder, seed, values)


def main() -> None:
    parser = options(__doc__, ("run", "table"), "runs/overoptimisation")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    args = parser.parse_args()
    if args.what == "table":
        return write_page(args.out, args.docs, args.seeds)
    cells: list[tuple[Path, Callable[[], Any]]] = [
        (
            args.out / task / arm.replace(" ", "-") / f"seed-{seed}",
            partial(cell, task, arm, seed, args.data, args.out),
        )
        for seed in args.seeds
        for task in args.tasks
        for arm in args.arms
    ]
    run_cells(cells, args.minutes)
    left = [str(folder) for folder, _ in cells if finished(folder) is None]
    print(f"{len(cells) - len(left)} of {len(cells)} cells are finished")


if __name__ == "__main__":
    main()
