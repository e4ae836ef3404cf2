"""The loop through the browser, recorded: pairs judged in Chromium, a store, KTO and DPO, gates, an A/B test.

    python tools/results/loop.py --out runs/loop --docs docs/results

14 raters judge pairs of the story model's stories on the pages of `steersman collect`, by keyboard: 12 have a hidden
preference (the quickstart's judge, which no stage sees) and err in 15% of choices, 2 click at random. The wheel reads
the store by its address. Users of the A/B test judge one pair each, blind, on the same pages. A second wheel reads
the same store with a careless learning rate. What is there already in --out is not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from browser import Rater, chromium
from pages import collecting
from playwright.sync_api import Browser
from wheel import ROLLOUT, SALAD, answers, hidden, numbers_of, recipe, rows

from steersman.assets import openings, story_model
from steersman.jsonl import jsonl_text
from steersman.people.collect.verb import CollectRecipe, QueueConfig, fill
from steersman.people.serving import Serving, read_serving
from steersman.people.sources import open_judgements
from steersman.people.store import open_store
from steersman.people.wheel.recipe import WheelRecipe
from steersman.people.wheel.run import run

RATERS, CLICKERS, GOLD = 12, 2, 14
PAIRS = 4
"""Pairs of an opening."""
BATCH = 75
"""Users of the A/B test between two calls of the wheel."""


class Recorded:
    """One store, its pages, and the wheel that reads it."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed, self.prompts = out, seed, openings()
        out.mkdir(parents=True, exist_ok=True)
        self.url = f"sqlite:///{out / 'feedback.db'}"

    def queue(self, name: str, found: list[dict[str, Any]], **how: int) -> None:
        """Puts pairs into a queue, as `steersman collect` does at its start."""
        file = self.out / f"{name}.jsonl"
        file.write_text(jsonl_text(found))
        asks = "Which story do you like better?"
        config = QueueConfig(task="compare", file=str(file), instructions=asks, **how)
        store = open_store(self.url)
        fill(store, CollectRecipe(store=self.url, queues={name: config}))
        store.close()

    def pairs(self) -> list[dict[str, Any]]:
        """Pairs of the model's stories, and gold ones of a story and a salad of words."""
        told = answers(str(story_model()), self.prompts, 2 * PAIRS, (self.seed, 5, 1))
        made = [
            {"prompt": self.prompts[place], "responses": [a, b], "models": ["turn-00", "turn-00"]}
            for place, texts in told.items()
            for a, b in zip(texts[::2], texts[1::2], strict=True)
            if a.strip() != b.strip() and a.strip() and b.strip()
        ]
        gold = [
            {"prompt": self.prompts[i], "responses": [told[i][0], SALAD], "gold": {"choice": 0}} for i in range(GOLD)
        ]
        return made + gold

    def met(self, serving: Serving, batch: int) -> list[dict[str, Any]]:
        """Pairs of both models' stories for users of the A/B test."""
        assert serving.candidate is not None
        both, places = (serving.current, serving.candidate), range(batch * BATCH, (batch + 1) * BATCH)
        asked = [self.prompts[p % len(self.prompts)] for p in places]
        told = [answers(s.path, asked, 1, (self.seed, 9, 2 + batch)) for s in both]
        return [
            {"prompt": prompt, "responses": [one[i][0] for one in told], "models": [s.name for s in both]}
            for i, prompt in enumerate(asked)
            if told[0][i][0].strip() != told[1][i][0].strip() and all(one[i][0].strip() for one in told)
        ]

    def wheel(self, name: str, epochs: int = 2, **more: Any) -> dict[str, Any]:
        """The wheel over the store. Scripted raters need no time to read, so it does not ask for any."""
        test = {"experiment": {"share": 0.5, "margin": 0.02, "most_units": 900}}
        made = recipe(self.out, name, 1, **{"lr": 1e-4, **test, **more}).model_dump(exclude_unset=True)
        made["judgements"] = {"folder": self.url, "at_least": 500, "held_out": 0.2}
        made["sift"] = {"fastest": 0, "gold_share": 0.65}
        made["kto"]["train"]["epochs"] = made["dpo"]["train"]["epochs"] = epochs
        return run(WheelRecipe.model_validate(made), resume=True)


def record(out: Path, seed: int) -> dict[str, Any]:
    """Everything, from the first pair to the decision; leaves out/record.json."""
    start, loop, base = time.perf_counter(), Recorded(out, seed), str(story_model())
    if not (out / "stories.jsonl").exists():
        loop.queue("stories", loop.pairs(), gold_every=6)
    with collecting("--store", loop.url) as (link, _), chromium() as browser:
        judged = out / "judged.json"
        if not judged.exists():
            judged.write_text(json.dumps(first_day(browser, link, seed)))
        told, batch, users = loop.wheel("wheel"), 0, 0
        while told["state"] != "done":
            print(told["state"], flush=True)
            # a user who has judged one pair leaves the next one open, so every pair is offered twice
            loop.queue(f"test {batch}", loop.met(read_serving(out / "wheel/serving.json"), batch), overlap=2)
            while True:
                user = Rater(browser, link, f"user {users}", seed=seed)
                there = user.begin(f"test {batch}")
                if there:
                    user.judge()
                    users += 1
                user.leave()
                if not there:
                    break
            batch, told = batch + 1, loop.wheel("wheel")
    refused = loop.wheel("careless", experiment=None, epochs=1, lr=1e-2, then=["kto"])["decisions"][0]
    (decision,) = told["decisions"]
    held = [row["prompt"] for row in rows(out / "wheel/round-01/answers-current.jsonl")]
    kto = str(out / "wheel/round-01/1-kto/model")
    models = {"turn-00": base, "turn-01, after KTO": kto, "turn-01": decision["path"], "careless": refused["path"]}
    found = {
        "decision": decision, "refused": refused, "users": met(loop.url), **json.loads(judged.read_text()),
        "hidden": {name: hidden(path, base, held).plain() for name, path in models.items()},
        "held_out_prompts": len(held), "serving": read_serving(out / "wheel/serving.json").current.name,
        "turns": {n: numbers_of(out / n / "round-01") for n in ("wheel", "careless")},
        "longest": ROLLOUT.max_new_tokens, "seed": seed, "seconds": round(time.perf_counter() - start),
    }  # fmt: skip
    (out / "record.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def first_day(browser: Browser, link: str, seed: int) -> dict[str, float]:
    """All raters judge in turn until no pair is left; how many, and how long a pair took."""
    names = [(f"rater {i}", False) for i in range(RATERS)] + [(f"clicker {i}", True) for i in range(CLICKERS)]
    raters = [Rater(browser, link, name, seed=seed, clicks=clicks) for name, clicks in names]
    begun, count = time.perf_counter(), 0
    at_work = [rater for rater in raters if rater.begin("stories")]
    while at_work:
        count += len(at_work)
        at_work = [rater for rater in at_work if rater.judge()]
    for rater in raters:
        rater.leave()
    return {"judged": count, "seconds_a_pair": round((time.perf_counter() - begun) / count, 2)}


def met(url: str) -> int:
    """Users of the A/B test who judged."""
    return len({one.user for one in open_judgements(url) if "turn-01" in one.models})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/loop"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", type=Path, help="where loop.json goes; without it nothing is written there")
    args = parser.parse_args()
    found = record(args.out, args.seed)
    if args.docs:
        (args.docs / "loop.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
