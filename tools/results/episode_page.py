"""What episodes.py found, as numbers, a picture and the tables of docs/results/environments.md."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from recording import finished, over_seeds, plain_axes, plt, rows_of

from steersman.guards.terminal import printable
from steersman.jsonl import read_jsonl
from steersman.tabular.gym import from_gymnasium
from steersman.tabular.mdp import value_iteration

sys.path.insert(0, "recipes/environments")
from guess_word import optimum
from library import WORD, Library

SHOWN = {
    "words": "word guessing",
    "calculator": "products, with a calculator",
    "calculator, no tool": "products, without one",
    "lake": "FrozenLake",
    "lake, slippery": "FrozenLake, slippery",
    "library": "searching a library",
    "dialogue": "slot filling",
}
BEGIN, END = "<!-- made by tools/results/episodes.py draw -->", "<!-- end -->"
GAMMA = 0.99


def folder_of(out: Path, seed: int, world: str) -> Path:
    """Where a run is kept."""
    return out / f"seed-{seed}" / world.replace(", ", "-").replace(" ", "-")


def write_page(out: Path, docs: Path, seeds: list[int]) -> None:
    """Writes environments.json and environments.png, and renews the part of environments.md between its marks."""
    found = {world: row for world in SHOWN if (row := _world(out, seeds, world))}
    found["lakes"] = {
        name: _lake(out, seeds, name) for name in ("lake", "lake, slippery") if _lake(out, seeds, name)["rows"]
    }
    if "library" in found:
        found["library"]["beside"] = _searches(out / "library")
    (docs / "environments.json").write_text(json.dumps(found, indent=1) + "\n")
    _draw(out, seeds, [w for w in SHOWN if w in found], docs / "environments.png")
    page = docs / "environments.md"
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{_markdown(found, out, seeds)}\n{END}{rest.partition(END)[2]}")


def _world(out: Path, seeds: list[int], world: str) -> dict[str, Any]:
    """Mean reward of held-out episodes before and after, its 95% interval within a seed, and what it cost."""
    runs = [s for seed in seeds if (s := finished(folder_of(out, seed, world)))]
    if not runs:
        return {}
    return {
        "before": over_seeds([round(s["reward/total_before"], 4) for s in runs]),
        "after": over_seeds([round(s["reward/total_after"], 4) for s in runs]),
        "interval": [round(1.96 * s.get("reward_se_after", 0.0), 3) for s in runs],
        "iterations": runs[0]["steps"],
    }


def _lake(out: Path, seeds: list[int], name: str) -> dict[str, Any]:
    """The discounted value of the start by each way to play: what episodes earned, or exact where a table says so."""
    solved = value_iteration(from_gymnasium(_make(name == "lake, slippery"), GAMMA))
    rows: dict[str, Any] = {}
    for way, key in ((name, None), (f"{name}, control PPO", None), (f"{name}, Q-learning", "value")):
        runs = [(folder_of(out, seed, way), s) for seed in seeds if (s := finished(folder_of(out, seed, way)))]
        if runs and key:
            rows[way] = over_seeds([round(s[key], 4) for _, s in runs])
        elif runs and "control" in way:
            rows[f"{way}: reaches the goal"] = over_seeds([s["held_out/return"] for _, s in runs])
        elif runs:
            rows[way] = over_seeds([round(_discounted(folder), 4) for folder, _ in runs])
            rows[f"{way}: reaches the goal"] = over_seeds([round(s["reward/total_after"], 3) for _, s in runs])
    return {"optimum": round(float(solved.value[0]), 4), "rows": rows}


def _make(slippery: bool) -> Any:
    import gymnasium

    return gymnasium.make("FrozenLake-v1", is_slippery=slippery)


def _discounted(folder: Path) -> float:
    """The mean of gamma^(turns before the reward) x reward in the last look's episodes."""
    rows = _last_look(folder)
    return mean(sum(t["reward"] * GAMMA**k for k, t in enumerate(row["turns"])) for row in rows)


def _last_look(folder: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(folder / "samples.jsonl")
    last = max(row["step"] for row in rows)
    return [row for row in rows if row["step"] == last]


def _searches(folder: Path) -> dict[str, float]:
    """What searches without a model earn on the held-out questions: one search of each kind."""
    rows = read_jsonl(folder / "held_out.jsonl")
    sections = [str(folder / f"sections_{name}.csv") for name in ("test", "val")]
    luck, common = random.Random(0), Counter(w for r in rows for w in set(WORD.findall(r["question"].lower())))
    ways = {
        "the whole question": lambda words: words,
        "three of its words, at random": lambda words: luck.sample(words, min(3, len(words))),
        "its three rarest words": lambda words: sorted(words, key=lambda w: common[w])[:3],
    }
    out = {}
    for name, way in ways.items():
        earned = []
        for row in rows:
            world = Library(sections, words=100)
            world.begin(row)
            letters = {word: letter for letter, word in world.listed.items()}
            earned.append(world.step(" ".join(letters[word] for word in way([*letters])))[1])
        out[name] = round(mean(earned), 4)
    return out


def _draw(out: Path, seeds: list[int], worlds: list[str], file: Path) -> None:
    """Held-out reward against iterations, a line per seed."""
    figure, axes = plt.subplots(1, len(worlds), figsize=(2.6 * len(worlds), 2.6), layout="constrained", squeeze=False)
    best = {"words": optimum(), "lake": 1.0, "calculator": 1.0}
    for axis, world in zip(axes[0], worlds, strict=True):
        for folder in [folder_of(out, seed, world) for seed in seeds]:
            if finished(folder):
                looks = [r for r in rows_of(folder) if "held_out/reward/total" in r]
                x, y = zip(*[(r["step"], r["held_out/reward/total"]) for r in looks], strict=True)
                axis.plot(x, y, color="#1f5f8b", lw=1.0, alpha=0.8)
        if world in best:
            axis.axhline(best[world], color="0.5", lw=0.8, ls="--")
        plain_axes(axis, SHOWN[world])
        axis.set_xlabel("iteration", fontsize=8)
    axes[0][0].set_ylabel("held-out reward", fontsize=8)
    figure.savefig(file, dpi=110)


def _markdown(found: dict[str, Any], out: Path, seeds: list[int]) -> str:
    lines = ["| world | before | after, by seed | 95% interval within a seed | iterations |", "|" + " --- |" * 5]
    for world in [w for w in SHOWN if w in found]:
        row = found[world]
        after = ", ".join(f"{x:.2f}" for x in row["after"]["values"])
        within = ", ".join(f"± {x:.2f}" for x in row["interval"])
        lines.append(f"| {SHOWN[world]} | {row['before']['mean']:.2f} | {after} | {within} | {row['iterations']} |")
    if "words" in found:
        lines += ["", f"The best player of the word game earns {optimum():.4f}, by all ways to play."]
    if "library" in found:
        beside = ", ".join(f"{name} {x:.2f}" for name, x in found["library"]["beside"].items())
        lines += ["", f"One search without a model earns: {beside}."]
    for name, lake in found["lakes"].items():
        lines += ["", f"| {SHOWN[name]}: value of the start, gamma = {GAMMA} | by seed |", "| --- | --- |"]
        lines += [f"| value iteration | {lake['optimum']} |"]
        lines += [f"| {way} | {', '.join(f'{x:g}' for x in row['values'])} |" for way, row in lake["rows"].items()]
    lines += ["", "![Held-out reward while training](environments.png)", "", "### Episodes to read", ""]
    for world in [w for w in SHOWN if w in found]:
        folder = next(f for seed in seeds if finished(f := folder_of(out, seed, world)))
        row = _last_look(folder)[0]
        talk = " / ".join(
            f"**{_plain(t['said'])}**" + (f" / {_plain(t['heard'])}" if t["heard"] else "")
            for t in row.get("turns") or []
        )
        said = talk or f"**{_plain(row['completion'])}**"
        lines.append(f"- {SHOWN[world]} ({sum(row['reward'].values()):.2f}): {_plain(row['prompt'])} / {said}")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """One line of a page, without what markdown would read in it."""
    text = printable(" ".join(text.split()))[:160]
    return "".join(f"\\{c}" if c in "*_<>[]|`" else c for c in text) or "(nothing)"
