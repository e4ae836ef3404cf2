"""A/B tests by simulation: how often they err when looked at after every judgement, and what the looking costs.

    python benchmarks/ab_tests.py --experiments 10000 --out docs/results/ab-tests.json

Prints the tables of docs/results/ab-tests.md. One core, minutes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steersman.statistics.estimates import wilson
from steersman.statistics.sample_size import fixed_size, outcomes
from steersman.statistics.sequential import BETS, arm_difference, first_crossing, user_scores

ALPHA = 0.05
CHUNK = 100


def z_crosses(x: np.ndarray, mean: float, first: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Whether the usual z-test of the mean is significant at any look from `first` on, and at the last."""
    n = np.arange(1, x.shape[-1] + 1)
    total, squares = np.cumsum(x, -1), np.cumsum(x**2, -1)
    sd = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 1e-12))
    z = np.abs(total / n - mean) / (sd / np.sqrt(n)) > 1.959964
    return z[..., first - 1 :].any(-1), z[..., -1]


def people(
    rng: np.random.Generator, shape: tuple[int, int], spread: float, users: int
) -> tuple[np.ndarray, np.ndarray]:
    """Users of judgements and who won: each user has his own share, Beta(spread, spread) around 1/2, and some judge a
    hundred times as often as others."""
    often = rng.pareto(1.2, (shape[0], users)) + 0.1
    often /= often.sum(1, keepdims=True)
    who = np.stack([rng.choice(users, shape[1], p=p) for p in often])
    own = rng.beta(spread, spread, (shape[0], users))
    return who, (rng.random(shape) < np.take_along_axis(own, who, 1)).astype(float)


def no_difference(experiments: int, length: int) -> list[dict]:
    """Share of experiments without a difference in which one is said, by kind of data and of test."""
    told: dict[str, dict[str, float]] = {}

    def add(name: str, x: np.ndarray, mean: float = 0.5, naive: np.ndarray | None = None) -> None:
        row = told.setdefault(name, {"ours": 0, "z_peeked": 0, "z_once": 0})
        peeked, once = z_crosses(x if naive is None else naive, mean)
        row["ours"] += int((first_crossing(x, ALPHA, null=mean) > 0).sum())
        row["z_peeked"] += int(peeked.sum())
        row["z_once"] += int(once.sum())

    for chunk in range(experiments // CHUNK):
        rng = np.random.default_rng(chunk)
        shape = (CHUNK, length)
        add("pairs, no ties", outcomes(0.0, 0.0, shape, rng))
        add("pairs, 30% ties", outcomes(0.0, 0.3, shape, rng))
        who, x = people(rng, shape, 1.0, 200)
        each = [user_scores(list(w), list(v), 1)[1] for w, v in zip(who, x, strict=True)]
        shortest = min(map(len, each))
        add("pairs of users who differ, by user", np.stack([e[:shortest] for e in each]), naive=x)
        who, _ = people(rng, shape, 1.0, 200)
        add("equal answers, prolific users, by judgement", outcomes(0.0, 0.0, shape, rng))
        treated = rng.random(shape) < 0.5
        thumbs = (rng.random(shape) < 0.7).astype(float)
        lengths = np.minimum(rng.lognormal(-2, 1, shape), 1.0)
        for name, values in (("thumbs of two arms", thumbs), ("lengths of two arms", lengths)):
            add(name, np.stack([arm_difference(v, t, 0.5)[0] for v, t in zip(values, treated, strict=True)]))
    count = experiments // CHUNK * CHUNK
    return [{"data": name, **{k: v / count for k, v in row.items()}} for name, row in told.items()]


SIZES = ((0.02, 0.2), (0.05, 0.0), (0.05, 0.2), (0.1, 0.2), (0.2, 0.2))
"""Effects on the win rate, and shares of ties."""


def power(runs: int, sizes: Sequence[tuple[float, float]] = SIZES) -> list[dict]:
    """What a sequential test needs, beside one of a size chosen beforehand for 80% power, over `runs` experiments."""
    rows = []
    for effect, ties in sizes:
        win = (1 - ties) / 2 + effect
        fixed = fixed_size(effect, math.sqrt(win + ties / 4 - (0.5 + effect) ** 2))
        rng, length = np.random.default_rng(1), 3 * fixed
        found = [first_crossing(outcomes(effect, ties, (CHUNK, length), rng), ALPHA) for _ in range(runs // CHUNK)]
        ended = np.sort(np.concatenate([np.where(n == 0, length + 1, n) for n in found]))
        row = {"win_rate": 0.5 + effect, "ties": ties, "fixed": fixed}
        row |= {"median": quantile(ended, 0.5), "needed": quantile(ended, 0.8)}
        rows.append(row | {"power_at_fixed": wilson(int((ended <= fixed).sum()), len(ended)).plain()})
    return rows


def quantile(ended: np.ndarray, share: float) -> list[int]:
    """After how many values this share of experiments has ended (rising), with the 95% bounds of order statistics."""
    spread = 1.96 * math.sqrt(share * (1 - share) * len(ended))
    return [int(ended[math.ceil(share * len(ended) + shift) - 1]) for shift in (0, -spread, spread)]


def size_row(row: dict) -> str:
    """A row of the second table."""
    reached = [100 * row["power_at_fixed"][key] for key in ("value", "low", "high")]
    cells = [with_margin(row[key], ",") for key in ("median", "needed")]
    cells.append(with_margin(reached, ".1f").replace(" ±", "% ±"))
    return f"| {row['win_rate']:.2f} | {row['ties']:.0%} | {row['fixed']:,} | {' | '.join(cells)} |"


def with_margin(estimate: Sequence[float], form: str) -> str:
    """A value with its bounds as the value and the larger half of its interval."""
    value, low, high = estimate
    return f"{value:{form}} ± {max(value - low, high - value):{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experiments", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=1000, help="judgements of one experiment, each looked at")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=20_000, help="experiments with a difference, of each size")
    args = parser.parse_args()
    errors, sizes = no_difference(args.experiments, args.length), power(args.runs)
    print(f"{args.experiments:,} experiments of {args.length:,} judgements, alpha {ALPHA}, {len(BETS)} bets\n")
    print("| without a difference | ours, looked at after each | z-test, looked at after each | z-test, once |")
    print("| --- | ---: | ---: | ---: |")
    for row in errors:
        print(f"| {row['data']} | {row['ours']:.2%} | {row['z_peeked']:.1%} | {row['z_once']:.1%} |")
    print(f"\n{args.runs:,} experiments a row; ± is half of a 95% interval\n")
    print("| win rate | ties | size of a fixed test | ours: half have ended at | 80% at | power at the fixed size |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in sizes:
        print(size_row(row))
    told = {"experiments": args.experiments, "length": args.length, "alpha": ALPHA, "errors": errors}
    told |= {"runs": args.runs, "power": sizes}
    if args.out:
        args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
