"""Draws a quickstart run: what PPO maximised, what the judge says, and how far the policy went.

python tools/results/quickstart_figure.py runs/quickstart docs/results/quickstart.png
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from steersman.jsonl import read_jsonl
from steersman.reward.gold import judge


def main(run: Path, out: Path) -> None:
    folder = run / "3-ppo"
    gold = defaultdict(list)
    for row in read_jsonl(folder / "samples.jsonl"):
        gold[row["step"]].append(judge(row["completion"]).gold)
    rows = read_jsonl(folder / "metrics.jsonl")
    curves = {
        "reward model's score\n(what PPO maximises)": [
            (r["step"], r["held_out/reward/total"]) for r in rows if "held_out/reward/total" in r
        ],
        "gold score\n(the judge, never seen by PPO)": [(step, mean(scores)) for step, scores in sorted(gold.items())],
        "KL to the start,\nnats per story": [(r["step"], r["held_out/kl"]) for r in rows if "held_out/kl" in r],
        "perplexity under\nthe starting model": [
            (r["step"], r["held_out/perplexity"]) for r in rows if "held_out/perplexity" in r
        ],
    }
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained")
    for axis, (title, points) in zip(axes, curves.items(), strict=True):
        axis.plot(*zip(*points, strict=True), color="#1f5f8b", lw=1.6, marker="o", ms=3)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("PPO iteration", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
