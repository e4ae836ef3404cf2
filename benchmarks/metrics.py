"""Samples per CPU second of every metric in the shape of a reward: 128 responses of 40 words, 2 references each.

    OMP_NUM_THREADS=1 python benchmarks/metrics.py

The texts are windows of the included story openings, so the same everywhere. The first call of a metric, in which it
loads what it needs, is not timed, and no text comes twice. Time is the process's own CPU time, so that other work on
the machine does not count; with OMP_NUM_THREADS=1 it is one thread's.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch

from steersman.metrics import METRICS, metric
from steersman.types import SteersmanError

ROOT = Path(__file__).resolve().parents[1]
STORY = str(ROOT / "src/steersman/assets/story-model")
ROWS, WORDS = 128, 40
SETTINGS = {"perplexity": {"path": STORY}, "msttr": {"segment": 20}, "cider": {}, "bertscore": {}}


def texts(seed: int, rows: int) -> list[str]:
    words = (ROOT / "src/steersman/assets/openings.txt").read_text().split()
    rng = random.Random(seed)
    starts = [rng.randrange(len(words) - WORDS) for _ in range(rows)]
    return [" ".join(words[i : i + WORDS]) for i in starts]


def batch(seed: int, name: str) -> tuple[list[str], list[list[str]], dict[str, list]]:
    said = texts(seed, ROWS)
    if name == "math_answer":
        rng = random.Random(seed)
        said = [f"{t} So the answer is $\\frac{{{rng.randrange(99)}}}{{{rng.randrange(1, 99)}}}$." for t in said]
        return said, [[f"\\frac{{{rng.randrange(99)}}}{{7}}"] for _ in said], {}
    # a reference shares its second half with the text, as a fair answer would
    words = [t.split() for t in said]
    references = [[" ".join(o.split()[: WORDS // 2] + w[WORDS // 2 :]) for o in (a, b)] for w, a, b in
                  zip(words, texts(seed + 1000, ROWS), texts(seed + 2000, ROWS), strict=True)]  # fmt: skip
    extra = {
        "table": [[["a", " ".join(w[3:6])], ["b", " ".join(w[20:24])], ["c", w[9]]] for w in words],
        "concepts": [w[:4] for w in words],
        "instruction_id_list": [["punctuation:no_comma", "length_constraints:number_sentences"]] * ROWS,
        "kwargs": [[{}, {"relation": "at least", "num_sentences": 2}]] * ROWS,
    }
    return said, references, extra


def rate(made, name: str, seconds: float = 0.6) -> float:
    def once(seed: int) -> float:
        said, references, extra = batch(seed, name)
        given = {need: extra[need] for need in made.needs if need in extra}
        start = time.process_time()
        made.score(said, references, None, **given)
        return time.process_time() - start

    once(0)
    spent, rounds = 0.0, 0
    while spent < seconds and rounds < 20:
        rounds += 1
        spent += once(rounds)
    return rounds * ROWS / spent


def main() -> None:
    torch.set_num_threads(1)
    corpus = Path("/tmp/steersman-cider.jsonl")
    corpus.write_text("".join(json.dumps({"references": [t]}) + "\n" for t in texts(5, 500)))
    SETTINGS["cider"] = {"corpus_file": str(corpus)}
    print("| metric | samples per CPU second |\n| --- | --- |")
    for name in METRICS:
        if name in ("classifier", "spice", "meteor1.5"):
            continue
        try:
            print(f"| {name} | {rate(metric(name, SETTINGS.get(name)), name):,.0f} |", flush=True)
        except SteersmanError as error:
            print(f"| {name} | {error} |")


if __name__ == "__main__":
    main()
