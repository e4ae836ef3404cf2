"""Learning curves of every on-policy method on one task: stories260k toward positive sentiment.

    python tools/results/curves.py search --data ../shared/data --out runs/curves
    python tools/results/curves.py run --data ../shared/data --out runs/curves --seeds 0 1 2
    python tools/results/curves.py draw --out runs/curves --docs docs/results --seeds 0 1 2

A run that has finished is not made again; `--minutes` begins no further run after so much CPU time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from recording import OPENINGS, finished, options, over_seeds, plain_axes, plt, rows_of, run_cells, verb

from steersman.algorithms import ALGORITHMS
from steersman.verbs import rl
from steersman.verbs.on_policy_recipes import RECIPES

BETA, ITERATIONS = 0.05, 24
SEARCH_SEED, SEARCH_ITERATIONS = 100, 16

ONCE: dict[str, Any] = {"epochs": 1, "minibatches": 1}
SEVERAL: dict[str, Any] = {"epochs": 1, "minibatches": 4}
"""Updates per iteration: one for plain score-function losses, four for losses that bound a ratio."""

SEARCHED = {
    "reinforce": (3e-4, 1e-3, 3e-3),
    "rloo": (3e-4, 1e-3, 3e-3),
    "a2c": (3e-4, 1e-3, 3e-3),
    "ppo": (1e-4, 3e-4, 1e-3),
    "grpo": (1e-4, 3e-4, 1e-3),
    "cispo": (1e-4, 3e-4, 1e-3),
}
"""Rates tried, with seed 100 and 16 iterations; the best by `objective` serves every method of its kind."""

FAMILIES: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "one reward against a baseline": {
        "reinforce": (ONCE, "reinforce"),
        "remax": (ONCE, "reinforce"),
        "rloo": (ONCE, "rloo"),
        "reinforce++": (SEVERAL, "grpo"),
    },
    "a critic, plain loss": {"reinforce-baseline": (ONCE, "a2c"), "a2c": (ONCE, "a2c")},
    "a critic, bounded steps": {
        "trpo": (SEVERAL, "ppo"),
        "ppo": (SEVERAL, "ppo"),
        "ppo-kl": (SEVERAL, "ppo"),
        "nlpo": (SEVERAL, "ppo"),
    },
    "relative to a group": {
        "grpo": (SEVERAL, "grpo"),
        "dr-grpo": (SEVERAL, "grpo"),
        "dapo": (SEVERAL, "grpo"),
        "gspo": (SEVERAL, "grpo"),
        "cispo": (SEVERAL, "cispo"),
    },
}
"""Settings beside the defaults, and whose rate. TRPO's actor has no rate; its updates are the critic's."""

METHODS = {name: chosen for family in FAMILIES.values() for name, chosen in family.items()}
COLOURS = ("#1f5f8b", "#c2571a", "#2e8b57", "#8a4fbf", "#b0306a")


def train(
    method: str,
    data: Path,
    folder: Path,
    seed: int,
    rate: float | None = None,
    iterations: int = ITERATIONS,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One run: 48 responses of at most 24 tokens per iteration, the same beta for every method."""
    settings = METHODS[method][0] if settings is None else settings
    rate = best_rate(METHODS[method][1], folder.parents[1]) if rate is None else rate
    return verb(
        rl, RECIPES[method], folder, seed,
        {
            "model": {"path": str(data / "stories260k/hf")},
            "data": {"path": str(data / "tinystories"), **OPENINGS},
            # GDPO gives each part of the reward a scale of its own already.
            "reward": {"parts": {"vader": {"builtin": "vader_sentiment"}}, "normalise": method != "gdpo"},
            "rollout": {"prompts": 12, "samples": 4, "max_new_tokens": 24, "held_out": 64, "eos_token_id": [1, 2]},
            "algorithm": {"beta": BETA, **settings},
            "optimizer": {"lr": rate, "warmup": 4},
            "critic": {"optimizer": {"lr": 1e-3}} if ALGORITHMS[method].critic else None,
            "iterations": iterations,
            "run": {"eval_every": 4, "save_every": iterations},
            "health": {"expect_eos": False},
        },
    )  # fmt: skip


def objective(folder: Path) -> float:
    """Gain in held-out score, in the deviations of the first iteration's scores, minus beta KL."""
    rows, summary = rows_of(folder), json.loads((folder / "summary.json").read_text())
    deviation = next(row["score/std"] for row in rows if "score/std" in row)
    gain = summary["reward/total_after"] - summary["reward/total_before"]
    return gain / deviation - BETA * summary["kl_after"]


def search(data: Path, out: Path, minutes: float) -> None:
    """Tries the rates and prints the objective that each reached."""
    cells: list[tuple[Path, Callable[[], Any]]] = []
    for method, rates in SEARCHED.items():
        for rate in rates:
            folder = out / "search" / f"{method}-{rate:g}"
            cells.append((folder, partial(train, method, data, folder, SEARCH_SEED, rate, SEARCH_ITERATIONS)))
    if run_cells(cells, minutes):
        print(json.dumps(searched(out), indent=1))


def searched(out: Path) -> dict[str, dict[str, float]]:
    """The objective by method and rate."""
    return {
        method: {f"{rate:g}": round(objective(out / "search" / f"{method}-{rate:g}"), 3) for rate in rates}
        for method, rates in SEARCHED.items()
    }


TABLE = {
    "reward/total": "VADER",
    "kl": "KL, nats per response",
    "perplexity": "perplexity",
    "distinct2": "distinct-2",
    "seconds": "seconds",
}


def collect(out: Path, seeds: list[int]) -> dict[str, Any]:
    """Held-out numbers of every method after training, over the seeds, and those of the start."""
    found = {m: [s for seed in seeds if (s := finished(out / f"seed-{seed}" / m))] for m in METHODS}
    start = next(runs for runs in found.values() if len(runs) == len(seeds))
    table: dict[str, Any] = {
        "start": {key: over_seeds([s[f"{key}_before"] for s in start]) for key in TABLE if key != "seconds"}
    }
    for method, runs in found.items():
        if runs:
            keys = {key: key if key == "seconds" else f"{key}_after" for key in TABLE}
            table[method] = {key: over_seeds([s[name] for s in runs]) for key, name in keys.items()}
            table[method]["objective"] = over_seeds([objective(Path(s["model"]).parent) for s in runs])
            table[method]["findings"] = [s["findings"] for s in runs]
    return {"seeds": seeds, "searched": searched(out), "methods": table}


def markdown(table: dict[str, Any], out: Path) -> str:
    """The table of the page: mean and deviation over the seeds."""
    head = ["method", "rate", *list(TABLE.values())[:-1], "objective"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for method, row in table["methods"].items():
        rate = (
            ""
            if method == "start"
            else "line search"
            if method == "trpo"
            else f"{best_rate(METHODS[method][1], out):g}"
        )
        cells = [_number(row[key], 3 if key in ("reward/total", "distinct2") else 2) for key in list(TABLE)[:-1]]
        cells.append(_number(row["objective"], 2) if "objective" in row else "0")
        lines.append(
            "| " + " | ".join([method if method == "start" else ALGORITHMS[method].title, rate, *cells]) + " |"
        )
    return "\n".join(lines)


def _number(cell: dict[str, Any], digits: int) -> str:
    return f"{round(cell['mean'], digits) + 0.0:.{digits}f} ± {cell['sd']:.{digits}f}"


def draw(out: Path, seeds: list[int], file: Path) -> None:
    """A column per family, the other methods grey behind it: score against iterations, and against KL."""
    curves = {method: _mean_curves(out, seeds, method) for method in METHODS}
    figure, axes = plt.subplots(2, len(FAMILIES), figsize=(12, 5.6), sharey=True, layout="constrained")
    for column, (family, members) in enumerate(FAMILIES.items()):
        for row, x in enumerate(("step", "held_out/kl")):
            axis = axes[row][column]
            for method, points in curves.items():
                if method not in members:
                    axis.plot(points[x], points["held_out/reward/total"], color="0.85", lw=0.8, zorder=1)
            for colour, method in zip(COLOURS, members, strict=False):
                points = curves[method]
                axis.plot(
                    points[x], points["held_out/reward/total"], color=colour, lw=1.6, marker="o", ms=2.5,
                    label=ALGORITHMS[method].title, zorder=2,
                )  # fmt: skip
            plain_axes(axis, family if row == 0 else "")
            axis.set_xlabel("iteration" if row == 0 else "KL to the start, nats per response", fontsize=8)
            if row == 1:
                axis.set_xlim(0, KL_SHOWN)
        axes[1][column].legend(fontsize=7.5, frameon=False, loc="lower right")
    for row in (0, 1):
        axes[row][0].set_ylabel("VADER, held-out prompts", fontsize=8)
    figure.savefig(file, dpi=110)


KL_SHOWN = 16.0
"""Where the KL axis ends, in nats."""


def _mean_curves(out: Path, seeds: list[int], method: str) -> dict[str, list[float]]:
    """The held-out looks of a method, each number a mean over the seeds."""
    names = ("step", "held_out/kl", "held_out/reward/total")
    runs = [[r for r in rows_of(out / f"seed-{seed}" / method) if names[1] in r] for seed in seeds]
    return {
        name: [sum(row[name] for row in looks) / len(looks) for looks in zip(*runs, strict=True)] for name in names
    }


def best_rate(kind: str, out: Path) -> float:
    """The searched rate with the highest objective."""
    return max(SEARCHED[kind], key=lambda rate: objective(out / "search" / f"{kind}-{rate:g}"))


def main() -> None:
    parser = options(__doc__, ("search", "run", "draw"), "runs/curves")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    args = parser.parse_args()
    if args.what == "search":
        search(args.data, args.out, args.minutes)
    elif args.what == "run":
        cells: list[tuple[Path, Callable[[], Any]]] = []
        for seed in args.seeds:
            for method in METHODS:
                folder = args.out / f"seed-{seed}" / method
                cells.append((folder, partial(train, method, args.data, folder, seed)))
        run_cells(cells, args.minutes)
    else:
        table = collect(args.out, args.seeds)
        (args.docs / "learning-curves.json").write_text(json.dumps(table, indent=1) + "\n")
        print(markdown(table, args.out))
        draw(args.out, args.seeds, args.docs / "learning-curves.png")


if __name__ == "__main__":
    main()
