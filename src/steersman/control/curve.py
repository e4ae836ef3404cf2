"""Learning curves as a picture: return against environment steps.

python -m steersman.control.curve OUT.png PPO=runs/a,runs/b,runs/c TRPO=runs/d
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from steersman.jsonl import read_jsonl

POINTS = 200


def learning_curves(runs: Mapping[str, Sequence[Path]], out: Path, goal: float | None = None) -> None:
    """One line per name: the mean over its run folders of the training return, with the range between seeds.

    `goal` draws the return that counts as solved.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, folders in runs.items():
        curves = [_curve(folder) for folder in folders]
        end = min(steps[-1] for steps, _ in curves)
        grid = np.linspace(max(steps[0] for steps, _ in curves), end, POINTS)
        values = np.stack([np.interp(grid, steps, returns) for steps, returns in curves])
        (line,) = axes.plot(grid, values.mean(0), lw=1.6, label=name)
        if len(curves) > 1:
            axes.fill_between(grid, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, lw=0)
    if goal is not None:
        axes.axhline(goal, color="0.5", lw=0.8, ls="--")
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return per episode while training")
    axes.grid(alpha=0.3)
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=90)


def _curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and returns, the latter smoothed over about a thirtieth of the run."""
    rows = [r for r in read_jsonl(folder / "metrics.jsonl") if "reward/return" in r]
    steps = np.array([r["env_steps"] for r in rows], dtype=float)
    returns = np.array([r["reward/return"] for r in rows], dtype=float)
    half = len(returns) // 60
    smooth = [returns[max(0, i - half) : i + half + 1].mean() for i in range(len(returns))]
    return steps, np.array(smooth)


if __name__ == "__main__":
    named = dict(word.split("=", 1) for word in sys.argv[2:])
    learning_curves({name: [Path(p) for p in paths.split(",")] for name, paths in named.items()}, Path(sys.argv[1]))
