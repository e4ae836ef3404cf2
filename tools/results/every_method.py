"""Every on-policy method on the task of learning-curves.md, rates searched equally for each, and Holm's correction.

    python tools/results/every_method.py search --data ../shared/data --out runs/every
    python tools/results/every_method.py run --data ../shared/data --out runs/every --seeds 0 1 2 3 4
    python tools/results/every_method.py draw --out runs/every --docs docs/results --seeds 0 1 2 3 4

`search` tries one grid for all, and goes on beyond it where a method's best rate lies at its edge. A run that has
finished is not made again; `--minutes` begins no further run after so much CPU time; `--only` takes some methods.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from curves import ITERATIONS, ONCE, SEARCH_ITERATIONS, SEARCH_SEED, SEVERAL, train
from curves import METHODS as EARLIER
from curves import objective as objective_of
from recording import finished, options, over_seeds, plain_axes, plt, rewrite, rows_of, run_cells
from scipy.stats import ttest_rel

from steersman.algorithms import ALGORITHMS
from steersman.statistics.estimates import holm

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
WIDEST = (1e-6, 1e-1)
"""Rates beyond these are not tried, whatever the edge says."""
PLAIN = ("gpg", "pass-at-k")
"""Later methods without a ratio, so one update per iteration; the others have four."""
SHOWN = {"VADER": "reward/total_after", "KL, nats": "kl_after", "distinct-2": "distinct2_after"}
"""Columns of the table, and what a run's summary calls them."""
WITHOUT_RATE = ("trpo",)
"""Its actor's steps have the length that the bound on KL gives them: one run says all that a search could."""


def settings(method: str) -> dict[str, Any]:
    """Updates per iteration of a method."""
    if method in EARLIER:
        return EARLIER[method][0]
    return ONCE if method in PLAIN else SEVERAL


def tried(out: Path, method: str) -> dict[float, float]:
    """The objective by rate, of the finished runs of the search."""
    folders = (out / "search").glob(f"{method}@*")
    return {float(f.name.partition("@")[2]): objective_of(f) for f in folders if finished(f) is not None}


def next_rate(method: str, found: dict[float, float]) -> float | None:
    """The rate to try next: of the grid, or half a decade beyond the edge at which the best lies."""
    if method in WITHOUT_RATE:
        return None if found else GRID[0]
    for rate in GRID:
        if rate not in found:
            return rate
    best = max(found, key=lambda rate: found[rate])
    beyond = {min(found): best / 3, max(found): best * 3}.get(best)
    return beyond if beyond is not None and WIDEST[0] <= beyond <= WIDEST[1] else None


def search(methods: list[str], data: Path, out: Path, minutes: float, iterations: int) -> None:
    """Tries rates until no method's best lies at the edge of what was tried, and prints all objectives."""
    going = True
    while going:
        cells = []
        for method in methods:
            if (rate := next_rate(method, tried(out, method))) is not None:
                folder = out / "search" / f"{method}@{rate:.3g}"
                cells.append((folder, partial(_train, method, data, folder, SEARCH_SEED, rate, iterations)))
        going = bool(cells) and run_cells(cells, minutes)
    print(json.dumps({method: tried(out, method) for method in methods}, indent=1))


def _train(method: str, data: Path, folder: Path, seed: int, rate: float, iterations: int) -> dict[str, Any]:
    return train(method, data, folder, seed, rate, iterations, settings(method))


def best_rate(out: Path, method: str) -> float:
    """The rate of the highest objective in the search."""
    found = tried(out, method)
    return max(found, key=lambda rate: found[rate])


def table(methods: list[str], out: Path, seeds: list[int]) -> dict[str, Any]:
    """The objective of each method over the seeds, and the chance of its lag behind the best after Holm's correction.

    Seeds are paired: the same seed has the same order of prompts for every method.
    """
    values = {m: [objective_of(out / f"seed-{seed}" / m) for seed in seeds] for m in methods}

    def ends(method: str) -> list[dict[str, Any]]:
        return [finished(out / f"seed-{seed}" / method) or {} for seed in seeds]

    best = max(values, key=lambda m: sum(values[m]))
    others = [m for m in methods if m != best]
    raw = [float(ttest_rel(values[best], values[m]).pvalue) for m in others]
    corrected = dict(zip(others, holm(raw), strict=True))
    return {
        m: {
            "rate": None if m in WITHOUT_RATE else best_rate(out, m),
            "objective": over_seeds(values[m]),
            "p_holm": corrected.get(m),
            **{name: over_seeds([end[key] for end in ends(m)]) for name, key in SHOWN.items()},
        }
        for m in sorted(methods, key=lambda m: -sum(values[m]))
    }


def markdown(made: dict[str, Any]) -> str:
    """The table of the page, the best method first."""
    lines = [
        f"| method | rate | {' | '.join(SHOWN)} | objective | p, behind the best |",
        f"| --- |{' ---: |' * (len(SHOWN) + 3)}",
    ]
    for method, row in made.items():
        rate = "none" if row["rate"] is None else f"{row['rate']:.3g}"
        numbers = [f"{row[name]['mean']:.3g} ± {row[name]['sd']:.2g}" for name in SHOWN]
        objective = f"{row['objective']['mean']:.2f} ± {row['objective']['sd']:.2f}"
        lag = "best" if row["p_holm"] is None else f"{row['p_holm']:.3f}"
        lines.append(f"| {ALGORITHMS[method].title} | {rate} | {' | '.join(numbers)} | {objective} | {lag} |")
    return "\n".join(lines) + "\n"


def draw(methods: list[str], out: Path, seeds: list[int], file: Path) -> None:
    """A small panel per method, the others grey behind it: held-out score against iterations."""
    name = "held_out/reward/total"
    looks = {m: [[r for r in rows_of(out / f"seed-{s}" / m) if name in r] for s in seeds] for m in methods}
    curves = {
        m: ([r["step"] for r in runs[0]], [sum(r[name] for r in at) / len(at) for at in zip(*runs, strict=True)])
        for m, runs in looks.items()
    }
    across = min(6, len(methods))
    down = -(-len(methods) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(2 * across, 1.7 * down), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(methods) :]:
        axis.set_axis_off()
    for axis, method in zip(axes.flat, methods, strict=False):
        for steps, score in curves.values():
            axis.plot(steps, score, color="0.88", lw=0.7)
        axis.plot(*curves[method], color="#1f5f8b", lw=1.6)
        plain_axes(axis, ALGORITHMS[method].title)
    figure.supxlabel("iteration", fontsize=9)
    figure.supylabel("VADER of 64 held-out prompts, mean over the seeds", fontsize=9)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = options(__doc__, ("search", "run", "draw"), "runs/every", seeds=(0, 1, 2, 3, 4))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    args = parser.parse_args()
    if args.what == "search":
        search(args.only, args.data, args.out, args.minutes, min(args.iterations, SEARCH_ITERATIONS))
    elif args.what == "run":
        run_cells(
            [
                (folder, partial(_train, m, args.data, folder, seed, best_rate(args.out, m), args.iterations))
                for seed in args.seeds
                for m in args.only
                for folder in [args.out / f"seed-{seed}" / m]
            ],
            args.minutes,
        )
    else:
        made = table(args.only, args.out, args.seeds)
        (args.docs / "every-method.json").write_text(
            json.dumps({"seeds": args.seeds, "methods": made}, indent=1) + "\n"
        )
        rewrite(args.docs / "every-method.md", markdown(made))
        draw(args.only, args.out, args.seeds, args.docs / "every-method.png")


if __name__ == "__main__":
    main()
