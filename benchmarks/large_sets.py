"""A million rows through `data.cache` and `data.stream`, for `sft` and for `dpo`: seconds and memory; to a page.

    python benchmarks/large_sets.py --model MODEL [--rows 1000000] [--verbs sft dpo]
        [--ways stream memory cache] [--work FOLDER] [--measured FILE] [--out docs/results/large-sets.md]

Rows are generated: a question with an answer, or with two, of made sentences, 60 to 200 tokens, in one file of JSON
lines. Each way runs in a process of its own, which says its peak of memory when it is done. What was measured is
added to FILE, and the page is of all that is there, so that verbs and ways can be measured one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

WORDS = [
    "water",
    "small",
    "river",
    "bright",
    "morning",
    "old",
    "house",
    "garden",
    "letter",
    "friend",
    "answer",
    "window",
]
BATCH, BATCHES = 32, 200
WAYS = ["stream", "memory", "cache"]
KINDS: dict[str, Any] = {"sft": "demonstration", "dpo": "preference"}


def write_rows(path: Path, verb: str, count: int) -> None:
    """The set, the same every time."""
    draw = random.Random(0)

    def said() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(20, 120)))

    with path.open("w") as file:
        for i in range(count):
            asked = f"{i}: " + " ".join(draw.choices(WORDS, k=draw.randint(5, 20)))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said()}]
            row = {"messages": turns}
            if verb == "dpo":
                row = {"prompt": turns[:1], "chosen": turns[1:], "rejected": [{**turns[1], "content": said()}]}
            file.write(json.dumps(row) + "\n")


def peak() -> float:
    """The process's peak of memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def side(verb: str, way: str, model: str, path: str, cache: str) -> dict[str, Any]:
    """One way in this process: until the first batch is collated, and the batches after that."""
    from steersman.data import Batches, LargeDataConfig, Order, collate, layout, training
    from steersman.model import load_tokenizer

    tokenizer = load_tokenizer(model)
    more: dict[str, Any] = {"cache": {"cache": cache}, "stream": {"stream": True}, "memory": {}}[way]
    config = LargeDataConfig.model_validate({"path": path, **more})
    before, started, own = peak(), time.monotonic(), time.process_time()
    data = training(config, KINDS[verb], layout(tokenizer, config), context=2048, order=Order(BATCH, 0))
    order = data.stream or Batches(len(data.train.lengths), BATCH, 0, data.train.lengths)
    batches = (collate([e for i in batch for e in data.train.groups[i]]) for batch in order.forever())
    next(batches)
    told = {"first": time.monotonic() - started, "own": time.process_time() - own, "before": before}
    own = time.process_time()
    for _ in islice(batches, BATCHES):
        pass
    told["batch"] = (time.process_time() - own) / BATCHES
    return told | {"peak": peak(), "load": os.getloadavg()[2]}


def apart(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def page(found: list[dict[str, Any]], model: str) -> str:
    loads = [x["load"] for x in found]
    lines = [
        "# Sets larger than memory", "",
        "Written by `python benchmarks/large_sets.py`: generated rows in one file of JSON lines, with the tokenizer",
        f"and chat template of {model}: conversations for `sft`, pairs of answers for `dpo`. Each way has a process",
        f"of its own on one core. Others worked on this machine of {os.cpu_count()} cores meanwhile, at load",
        f"averages of {min(loads):.1f} to {max(loads):.1f}: of the seconds, those in brackets are the process's own.",
        "Memory is the peak of the process, and in brackets what of it was there before the data. A step is read and",
        f"collated, {BATCH} rows of it, without its model; its own time is the mean of the next {BATCHES}.", "",
        "| verb | rows (MB) | way | seconds to the first step | memory, MiB | ms a step |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for x in found:
        lines.append(
            f"| {x['verb']} | {x['rows']:,} ({x['size']:,.0f}) | {x['way']} | {x['first']:,.0f} ({x['own']:,.1f}) | "
            f"{x['peak']:,.0f} ({x['before']:,.0f}) | {1000 * x['batch']:.1f} |"
        )
    kept = {x["verb"]: f"{1000 * x['kept'] / x['rows']:.2f} kB a row (`{x['verb']}`)" for x in found if "kept" in x}
    lines += [
        "",
        f"On disk the tokens take {' and '.join(kept.values())}.",
        "What the stream waits for is its first buffer of 10,000 rows; all the steps that were timed came out of it,",
        "so reading and tokenising the rest are not in its `ms a step`. What the cache waits for the first time, and",
        "the memory of rows in memory, grow with the rows. Pages of the cache's file that were read count in its",
        "peak, though the system takes them back when it needs memory. In memory `dpo` also reads all answers with",
        "its reference before the first step, which is no part of the seconds here; the others do so step by step.",
    ]
    return "\n".join(lines) + "\n"


def measured(verb: str, ways: list[str], rows: int, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The ways asked for, each in a process of its own; the cache twice."""
    whole, part, cache = folder / "rows.jsonl", folder / "part.jsonl", folder / "cache"
    write_rows(whole, verb, rows)
    with whole.open() as lines:
        part.write_text("".join(islice(lines, rows // 10)))
    for name, way, path, count in (
        ("`data.stream`", "stream", whole, rows), ("in memory", "memory", part, rows // 10),
        ("`data.cache`, the first time", "cache", whole, rows), ("`data.cache`, again", "cache", whole, rows),
    ):  # fmt: skip
        if way in ways:
            told = {"verb": verb, "way": name, "rows": count, "size": path.stat().st_size / 1e6}
            told |= apart("--model", model, "--side", verb, way, str(path), str(cache))
            kept = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
            yield told | ({"kept": kept / 1e6} if kept else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--verbs", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--measured", type=Path, default=Path("large_sets.jsonl"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", nargs=4, metavar=("VERB", "WAY", "PATH", "CACHE"))
    given = parser.parse_args()
    if given.side:
        verb, way, path, cache = given.side
        print(json.dumps(side(verb, way, given.model, path, cache)))
        return
    if given.work:
        given.work.mkdir(parents=True, exist_ok=True)
    for verb in given.verbs:
        with tempfile.TemporaryDirectory(dir=given.work) as folder:
            for told in measured(verb, given.ways, given.rows, given.model, Path(folder)):
                with given.measured.open("a") as file:
                    file.write(json.dumps(told) + "\n")
    found = [json.loads(line) for line in given.measured.open(encoding="utf-8")]
    text = page(found, Path(given.model).name)
    if given.out:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
