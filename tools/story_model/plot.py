"""The training curve of the story model as a small picture.

python tools/story_model/plot.py runs/story-model/run docs/results/story-model.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with metrics.jsonl")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()

    rows = [json.loads(line) for line in (args.run / "metrics.jsonl").open(encoding="utf-8")]
    loss = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    held = [(r["step"], r["held_out/loss"]) for r in rows if "held_out/loss" in r]
    blocks = [loss[i : i + WINDOW] for i in range(0, len(loss) - WINDOW + 1, WINDOW)]
    figure, axes = plt.subplots(figsize=(6, 3.4))
    steps = [sum(s for s, _ in b) / WINDOW for b in blocks]
    axes.plot(
        steps, [sum(x for _, x in b) / WINDOW for b in blocks], lw=1, label=f"training (mean of {WINDOW} updates)"
    )
    axes.plot(*zip(*held, strict=True), "o-", ms=3, lw=1, label="held-out real stories")
    axes.set(xlabel="updates", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
