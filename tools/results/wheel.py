"""The wheel, recorded: raters with a hidden preference, two turns, and a model that the gates refuse.

    python tools/results/wheel.py --out runs/wheel-record

leaves record.json there, and the wheel's own folder with its page; minutes on one core. The hidden preference is the
story judge of the quickstart (`steersman/reward/gold.py`), which no stage sees: 40 raters follow it and say the
opposite in 15% of choices; 4 more click at random. The wheel sees their judgements alone. In the A/B test each user
judges one pair, blind, sides at random, again with 15% noise.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from steersman.assets import openings, story_model
from steersman.data import DataConfig, Query, Row
from steersman.flywheel.players import Player
from steersman.jsonl import read_jsonl
from steersman.people.serving import Serving, read_serving
from steersman.people.wheel.recipe import WheelRecipe
from steersman.people.wheel.run import run
from steersman.recipe.sections import ModelConfig, RolloutConfig
from steersman.reward.gold import judge
from steersman.run.device import resolve_device
from steersman.run.run_config import RunConfig
from steersman.statistics.estimates import Estimate, bootstrap, mean

NOISE = 0.15
RATERS, CLICKERS, GOLD = 40, 4, 10
PAIRS = 8
"""Pairs an opening that are judged in each turn."""
BATCH = 50
"""Users of the A/B test between two calls of the wheel."""
SALAD = "the the happy friend the the happy happy the the the."


class People:
    """Who judges; `out/inbox` is where their judgements arrive."""

    def __init__(self, out: Path, seed: int) -> None:
        self.inbox, self.seed, self.clock = out / "inbox", seed, 0.0
        self.inbox.mkdir(parents=True, exist_ok=True)
        self.prompts = openings()

    def prefers_first(self, first: str, second: str, rng: random.Random) -> bool:
        a, b = judge(first).gold, judge(second).gold
        return (a >= b) != (rng.random() < NOISE)

    def row(self, user: str, prompt: str, sides: list[tuple[str, str]], rng: random.Random) -> dict[str, Any]:
        """A judgement of two (model, answer), which are shown in an order drawn at random."""
        rng.shuffle(sides)
        (_, first), (_, second) = sides
        clicks = user.startswith("clicker")
        chosen = rng.random() < 0.5 if clicks else self.prefers_first(first, second, rng)
        self.clock += 1
        return {
            "id": f"{self.seed}-{int(self.clock)}", "user": user, "time": self.clock, "prompt": prompt,
            "answers": [first, second], "models": [m for m, _ in sides], "choice": "first" if chosen else "second",
            "seconds": round(rng.lognormvariate(2, 0.5), 1),
        }  # fmt: skip

    def judge_pairs(self, name: str, model: str, path: str) -> None:
        """A day of judgements of pairs of one model's answers, gold items among them."""
        file, rng = self.inbox / f"{name}.jsonl", random.Random(f"{self.seed}/{name}")
        users = [f"rater-{i}" for i in range(RATERS)] + [f"clicker-{i}" for i in range(CLICKERS)]
        rows, told = [], answers(path, self.prompts, 2 * PAIRS, (self.seed, len(name), 1))
        for place, texts in told.items():
            for a, b in zip(texts[::2], texts[1::2], strict=True):
                if a.strip() != b.strip() and a.strip() and b.strip():
                    rows.append(self.row(rng.choice(users), self.prompts[place], [(model, a), (model, b)], rng))
        for user in users:
            for i in range(GOLD):
                good = told[i][0]
                row = self.row(user, self.prompts[i], [(model, good), (model, SALAD)], rng)
                rows.append(row | {"expected": "first" if row["answers"][0] == good else "second"})
        append(file, rows)

    def meet(self, serving: Serving, batch: int) -> None:
        """Users of the A/B test: each sees one answer of either model, and chooses."""
        assert serving.candidate is not None
        rng = random.Random(f"{self.seed}/{serving.turn}/{batch}")
        places = [rng.randrange(len(self.prompts)) for _ in range(BATCH)]
        asked = [self.prompts[p] for p in places]
        streams = (self.seed, serving.turn, 2 + batch)
        both = [(s.name, answers(s.path, asked, 1, streams)) for s in (serving.current, serving.candidate)]
        rows = [
            self.row(f"user-{serving.turn}-{batch}-{i}", asked[i], [(name, told[i][0]) for name, told in both], rng)
            for i in range(BATCH)
        ]
        append(self.inbox / f"test-{serving.turn}.jsonl", rows)


def answers(path: str, prompts: list[str], n: int, seed: tuple[int, ...]) -> dict[int, list[str]]:
    """`n` answers of a model to each prompt."""
    run_config = RunConfig(threads=1)
    player = Player(ModelConfig(path=path), run_config, resolve_device(run_config.device))
    queries = [Query(p, Row({"prompt": p}, "openings", i)) for i, p in enumerate(prompts)]
    rows, _ = player.answer(queries, range(len(queries)), DataConfig(path="openings"), ROLLOUT, n=n, seed=seed)
    told: dict[int, list[str]] = {}
    for row in rows:
        told.setdefault(row["index"], []).append(row["completion"])
    return told


ROLLOUT = RolloutConfig(held_out=64, max_new_tokens=48, temperature=0.8)


def recipe(out: Path, name: str, turns: int, lr: float = 5e-5, **more: Any) -> WheelRecipe:
    values = {
        "model": {"path": str(story_model())},
        "judgements": {"folder": str(out / "inbox"), "at_least": 1000, "held_out": 0.2},
        "then": ["kto", "dpo"],
        "kto": {"train": {"batch_size": 32, "epochs": 1}, "optimizer": {"lr": lr}},
        "dpo": {"train": {"batch_size": 32, "epochs": 1}, "optimizer": {"lr": lr}},
        "rollout": ROLLOUT,
        "experiment": {"share": 0.5, "margin": 0.02, "most_units": 3000},
        "turns": turns,
        "run": {"dir": str(out / name), "threads": 1},
        **more,
    }
    return WheelRecipe.model_validate(values)


def hidden(path: str, base: str, prompts: list[str], n: int = 8) -> Estimate:
    """Win rate of a model over the base by the hidden preference itself, without noise, on held-out openings."""
    mine, theirs = (answers(p, prompts, n, (77, side)) for side, p in enumerate((path, base)))
    won, places = [], []
    for place in mine:
        for a, b in zip(mine[place], theirs[place], strict=True):
            x, y = judge(a).gold, judge(b).gold
            won.append(0.5 if x == y else float(x > y))
            places.append(place)
    return bootstrap(mean, [np.array(won)], clusters=np.array(places))


def turns(out: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Two turns: judgements of the model that serves, then the A/B test batch by batch until the wheel decides."""
    people, folder = People(out, seed), out / "wheel"
    for number in (1, 2):
        current = read_serving(folder / "serving.json").current if number > 1 else None
        name, path = (current.name, current.path) if current else ("turn-00", str(story_model()))
        people.judge_pairs(f"day-{number}", name, path)
        told, batch = run(recipe(out, "wheel", number), resume=True), 0
        while told["state"] != "done":
            print(told["state"], flush=True)
            people.meet(read_serving(folder / "serving.json"), batch)
            batch += 1
            told = run(recipe(out, "wheel", number), resume=True)
        yield told["decisions"][-1]


def record(out: Path, seed: int) -> None:
    """Runs everything, and leaves out/record.json."""
    start, base = time.perf_counter(), str(story_model())
    decisions = list(turns(out, seed))
    served = read_serving(out / "wheel/serving.json").current
    careless = run(recipe(out, "careless", 1, lr=1e-2, experiment=None), resume=True)
    held = [row["prompt"] for row in rows(out / "wheel/round-02/answers-current.jsonl")]
    models = {d["candidate"]: d["path"] for d in decisions}
    models |= {f"turn-0{n}, after KTO": str(out / f"wheel/round-0{n}/1-kto/model") for n in (1, 2)}
    models |= {"careless": careless["decisions"][0]["path"]}
    wins = {name: hidden(path, base, held).plain() for name, path in (models | {"turn-00": base}).items()}
    places = [out / "wheel/round-01", out / "wheel/round-02", out / "careless/round-01"]
    told = {
        "decisions": decisions, "serving": served.name, "careless": careless["decisions"][0], "hidden": wins,
        "held_out_prompts": len(held),
        "turns": {str(p.relative_to(out)): numbers_of(p) for p in places},
        "seconds": round(time.perf_counter() - start), "seed": seed,
    }  # fmt: skip
    (out / "record.json").write_text(json.dumps(told, indent=1) + "\n")


def numbers_of(place: Path) -> dict[str, Any]:
    """What a turn collected, whom it left out, and what it measured."""
    out = rows(place / "left-out.jsonl")
    kinds = {(row["user"].split("-")[0], row["user"]) for row in out if row["reason"].startswith("rater ")}
    return {
        "collected": len(rows(place / "collected.jsonl")), "kept": len(rows(place / "kept.jsonl")),
        "left_out": dict(Counter(row["reason"] for row in out)),
        "people_left_out": dict(Counter(kind for kind, _ in kinds)),
        "evaluation": rows(place / "evaluation.jsonl"), "gates": rows(place / "gates.jsonl"),
    }  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path)


def append(path: Path, found: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/wheel-record"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(
            f"{args.out} is there already; choose another --out, since people's judgements are made once"
        )
    record(args.out, args.seed)


if __name__ == "__main__":
    main()
