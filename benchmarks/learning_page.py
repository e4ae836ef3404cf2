"""Numbers and picture of the learning comparison, from the runs that learning.py left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy.stats import t as student

SIDES = ("steersman", "trl")
PER_ITERATION = 64
COLOURS = {"steersman": "#1f5f8b", "trl": "#c2571a"}
TITLES = {"ppo": "PPO: reward model's score", "grpo": "GRPO: VADER's compound score"}


def summarise(out: Path, methods: list[str], seeds: list[int]) -> dict[str, Any]:
    """By method: the curves of both sides, and what differs with a 95% interval."""
    found: dict[str, Any] = {}
    for method in methods:
        curves = {side: [_curve(out / f"{method}-{side}-{seed}") for seed in seeds] for side in SIDES}
        path = out / f"same-{method}.json"
        found[method] = {
            "given": json.loads(path.read_text()) if path.exists() else None,
            "compared": {
                name: _compare(curves, name) for name in ("final", "area", "kl", "reward_per_kl", "trained")
            },
            "curves": curves,
        }
    return {"results": found}


def _curve(run: Path) -> dict[str, Any]:
    """Held-out score and KL by responses seen, the training scores, and what sums the run up.

    `area` is the mean held-out score over the run (trapezoids), `trained` the mean score of all training responses,
    `reward_per_kl` what was gained on held-out prompts per nat of KL at the end.
    """
    looks, log = json.loads((run / "looks.json").read_text()), json.loads((run / "log.json").read_text())
    at = [look["iteration"] * PER_ITERATION for look in looks]
    score = [look["score"] for look in looks]
    area = sum((a + b) / 2 * (y - x) for a, b, x, y in zip(score, score[1:], at, at[1:], strict=False))
    return {
        "responses": at,
        "score": [round(x, 4) for x in score],
        "kls": [round(look["kl"], 3) for look in looks],
        "vader": [round(look["vader"], 4) for look in looks],
        "training": [round(x, 4) for x in log["score"]],
        "final": score[-1],
        "area": area / (at[-1] - at[0]),
        "kl": looks[-1]["kl"],
        "reward_per_kl": (score[-1] - score[0]) / looks[-1]["kl"],
        "trained": mean(log["score"]),
    }


def _compare(curves: dict[str, list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """Mean and deviation of both sides over the seeds, and ours minus theirs with Welch's 95% interval."""
    ours, theirs = ([curve[name] for curve in curves[side]] for side in SIDES)
    told = {side: [round(x, 4) for x in values] for side, values in zip(SIDES, (ours, theirs), strict=True)}
    difference = mean(ours) - mean(theirs)
    parts = [stdev(values) ** 2 / len(values) if len(values) > 1 else 0.0 for values in (ours, theirs)]
    if len(ours) < 2 or sum(parts) == 0:
        return {**told, "difference": round(difference, 4)}
    freedom = sum(parts) ** 2 / sum(p**2 / (len(ours) - 1) for p in parts)
    half = float(student.ppf(0.975, freedom)) * math.sqrt(sum(parts))
    return {
        **told,
        "mean": {side: round(mean(values), 4) for side, values in told.items()},
        "sd": {side: round(stdev(values), 4) for side, values in told.items()},
        "difference": round(difference, 4),
        "interval": [round(difference - half, 4), round(difference + half, 4)],
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Held-out score and KL over responses: a line per seed, and the mean with its range over the seeds."""
    methods = list(found["results"])
    figure, axes = plt.subplots(2, len(methods), figsize=(4.6 * len(methods), 5.6), sharex=True, squeeze=False)
    for column, method in enumerate(methods):
        for row, (name, label) in enumerate((("score", "held-out score"), ("kls", "KL, nats per response"))):
            axis = axes[row][column]
            for side in SIDES:
                curves = found["results"][method]["curves"][side]
                at = curves[0]["responses"]
                values = list(zip(*(curve[name] for curve in curves), strict=True))
                low, high = [min(v) for v in values], [max(v) for v in values]
                axis.fill_between(at, low, high, color=COLOURS[side], alpha=0.18, linewidth=0)
                title = f"{side}" if side == "steersman" else f"TRL {'1.12.0' if method == 'ppo' else '1.16.0'}"
                axis.plot(at, [mean(v) for v in values], color=COLOURS[side], label=title, marker="o", markersize=3)
            axis.set_ylabel(label, fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][column].set_title(TITLES[method], fontsize=9)
        axes[0][column].legend(fontsize=8, frameon=False, loc="lower right")
        axes[1][column].set_xlabel("responses seen", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
