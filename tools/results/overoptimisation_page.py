"""The table of docs/results/overoptimisation.md: gold at equal KL and at the end, of what the runs left."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from recording import finished, rewrite

Array = np.ndarray
ARMS = ("plain", "ensemble", "kl budget", "early stop", "refreshed", "diversity", "bottleneck")
TASKS = ("happy", "polite", "arena")
LEVELS = {"happy": (4.0, 8.0), "polite": (4.0, 8.0), "arena": (4.0, 8.0)}
"""KL in nats per answer at which gold is compared."""


@dataclass(slots=True)
class Look:
    """What a policy was like at one look: KL to the start, and gold of every held-out prompt."""

    kl: float
    gold: Array
    proxy: float
    distinct2: float


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")] if path.exists() else []


def on_policy(folder: Path) -> tuple[list[Look], int]:
    """The looks of a run, and the place of the one whose weights were saved."""
    seen, texts = [r for r in rows(folder / "metrics.jsonl") if "held_out/kl" in r], rows(folder / "samples.jsonl")
    looks = []
    for row in seen:
        at = sorted((t for t in texts if t["step"] == row["step"]), key=lambda t: t["index"])
        gold = np.array([t["reward"]["gold"] for t in at])
        looks.append(Look(row["held_out/kl"], gold, row["held_out/reward/proxy"], row["held_out/distinct2"]))
    judged = [r.get("held_out/judge", -math.inf) for r in seen]
    return looks, judged.index(max(judged)) if any(map(math.isfinite, judged)) else len(looks) - 1


def arena(folder: Path) -> tuple[list[Look], int]:
    """The rounds of an arena, and the place of the one whose model it ended with."""
    looks = []
    for row in rows(folder / "metrics.jsonl"):
        held = sorted(rows(folder / f"round-{row['step']:02d}/held-out.jsonl"), key=lambda r: r["index"])
        gold = np.array([r["gold"]["gold"] for r in held])
        looks.append(Look(row["kl"], gold, row["reward/judge"], row["text/distinct2"]))
    summary = finished(folder)
    last = None if summary is None else summary["kl_after"]
    return looks, next((i for i, look in enumerate(looks) if look.kl == last), len(looks) - 1)


def looks_of(out: Path, task: str, arm: str, seed: int) -> tuple[list[Look], int] | None:
    """None where the cell is not finished."""
    folder = out / task / arm.replace(" ", "-") / f"seed-{seed}"
    if finished(folder) is None:
        return None
    if task == "arena":
        return arena(folder)
    if arm == "refreshed":
        early, later = on_policy(folder / "half")[0], on_policy(folder / "rest")[0]
        return early + later[1:], len(early) + len(later) - 2
    return on_policy(folder)


def at_kl(looks: Sequence[Look], level: float) -> Array | None:
    """Gold of every prompt where KL first reaches the level, between two looks in a straight line."""
    for before, after in itertools.pairwise(looks):
        if before.kl < level <= after.kl:
            share = (level - before.kl) / (after.kl - before.kl)
            return (1 - share) * before.gold + share * after.gold
    return None


def estimate(values: Sequence[Array]) -> dict[str, float] | None:
    """Mean of all prompts of all seeds, and half its 95% interval."""
    if not values:
        return None
    every = np.concatenate(values)
    half = 1.96 * every.std(ddof=1) / math.sqrt(len(every)) if len(every) > 1 else math.nan
    return {"mean": round(float(every.mean()), 4), "half": round(float(half), 4), "seeds": len(values)}


def measure(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """By task and arm: gold at each level of KL and at the end, and what it is less `plain`'s, prompt by prompt."""
    table: dict[str, Any] = {}
    for task in TASKS:
        found = {arm: {s: x for s in seeds if (x := looks_of(out, task, arm, s)) is not None} for arm in ARMS}
        for arm, cells in found.items():
            if not cells:
                continue
            row: dict[str, Any] = {"seeds": sorted(cells)}
            ends = {s: looks[end] for s, (looks, end) in cells.items()}
            row["start"] = estimate([looks[0].gold for looks, _ in cells.values()])
            row["end"] = estimate([look.gold for look in ends.values()])
            row["kl"] = round(float(np.mean([look.kl for look in ends.values()])), 2)
            row["distinct2"] = round(float(np.mean([look.distinct2 for look in ends.values()])), 3)
            plain = {s: looks[end].gold for s, (looks, end) in found["plain"].items()}
            row["end_less_plain"] = estimate([ends[s].gold - plain[s] for s in ends if s in plain])
            for level in LEVELS[task]:
                gold = {s: x for s, (looks, _) in cells.items() if (x := at_kl(looks, level)) is not None}
                base = {s: x for s, (looks, _) in found["plain"].items() if (x := at_kl(looks, level)) is not None}
                row[f"at {level:g}"] = estimate(list(gold.values()))
                row[f"at {level:g} less plain"] = estimate([gold[s] - base[s] for s in gold if s in base])
            if task == "arena":
                rounds = [[round(float(look.gold.mean()), 3) for look in looks] for looks, _ in cells.values()]
                row["rounds"] = rounds
                row["above_start"] = all(min(r[1:]) > r[0] for r in rounds)
            table.setdefault(task, {})[arm] = row
    return table


def said(cell: dict[str, float] | None, sign: bool = False) -> str:
    if cell is None:
        return ""
    return f"{cell['mean']:{'+' if sign else ''}.3f} ± {cell['half']:.3f}"


def markdown(table: dict[str, Any]) -> str:
    """One table a task."""
    lines = []
    for task, arms in table.items():
        levels = [f"at {level:g}" for level in LEVELS[task]]
        head = ["", "seeds", *(f"gold {level} nats" for level in levels), *(f"less plain {x}" for x in levels)]
        head += ["gold of the model it ends with", "less plain", "KL", "distinct-2"]
        head += ["gold by round"] if task == "arena" else []
        first = next(iter(arms.values()))
        lines += [f"### {task}: gold {said(first['start'])} at the start", "", f"| {' | '.join(head)} |"]
        lines.append("| " + " | ".join("---" for _ in head) + " |")
        for arm, row in arms.items():
            cells = [arm, str(len(row["seeds"])), *(said(row[x]) for x in levels)]
            cells += [said(row[f"{x} less plain"], True) if arm != "plain" else "" for x in levels]
            cells += [said(row["end"]), said(row["end_less_plain"], True) if arm != "plain" else ""]
            cells += [f"{row['kl']:.1f}", f"{row['distinct2']:.2f}"]
            if task == "arena":
                cells.append("; ".join(", ".join(f"{x:.2f}" for x in run) for run in row["rounds"]))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write_page(out: Path, docs: Path, seeds: Sequence[int]) -> None:
    """overoptimisation.json, and the tables of the page; its other words stay."""
    table = measure(out, seeds)
    (docs / "overoptimisation.json").write_text(json.dumps(table, indent=1) + "\n")
    rewrite(docs / "overoptimisation.md", markdown(table))
