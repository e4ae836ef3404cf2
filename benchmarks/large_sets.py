"""A million conversations through `data.cache` and `data.stream`: seconds and memory; written to a page.

    python benchmarks/large_sets.py --model MODEL [--rows 1000000] [--work FOLDER] [--out docs/results/large-sets.md]

Rows are generated: a question and an answer of made sentences, 60 to 200 tokens, in one file of JSON lines. Each way
runs in a process of its own, which says its peak of memory when it is done.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
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


def write_rows(path: Path, count: int) -> None:
    """The set, the same every time."""
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            asked = f"{i}: " + " ".join(draw.choices(WORDS, k=draw.randint(5, 20)))
            said = " ".join(draw.choices(WORDS, k=draw.randint(20, 120)))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": turns}) + "\n")


def peak() -> float:
    """The process's peak of memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def side(way: str, model: str, path: str, cache: str) -> dict[str, Any]:
    """One way in this process: until rows are ready, and the collated batches after that."""
    from steersman.data import Batches, LargeDataConfig, collate, layout, training
    from steersman.model import load_tokenizer

    tokenizer = load_tokenizer(model)
    more: dict[str, Any] = {"cache": {"cache": cache}, "stream": {"stream": True}, "memory": {}}[way]
    config = LargeDataConfig.model_validate({"path": path, **more})
    before, started = peak(), time.monotonic()
    data = training(config, layout(tokenizer, config), 2048, batch_size=BATCH, seed=0)
    ready = time.monotonic() - started
    order = data.stream or Batches(len(data.train), BATCH, 0, data.train.lengths)
    started = time.monotonic()
    for batch in islice(order.forever(), BATCHES):
        collate([data.train[i] for i in batch])
    return {
        "way": way, "rows": len(data.train), "ready": ready, "batch": (time.monotonic() - started) / BATCHES,
        "before": before, "peak": peak(),
    }  # fmt: skip


def apart(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def page(found: list[tuple[str, dict[str, Any]]], count: int, size: float, kept: float, model: str) -> str:
    lines = [
        "# Sets larger than memory", "",
        f"Written by `python benchmarks/large_sets.py`: {count:,} generated conversations ({size:,.0f} MB of JSON",
        f"lines) with the tokenizer and chat template of {model}, on one core of a shared machine. Memory is the",
        "peak of the process, and in brackets what of it was there before the data. Batches are of 32 rows, read and",
        "collated, the first 200.", "",
        "| way | seconds until ready | memory, MiB | ms a batch |", "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for name, x in found:
        lines.append(
            f"| {name} | {x['ready']:,.1f} | {x['peak']:,.0f} ({x['before']:,.0f}) | {1000 * x['batch']:.1f} |"
        )
    lines += [
        "",
        f"The tokens lie on disk in {kept:,.0f} MB. A batch of the stream has its share of reading and tokenising",
        "in it; the first buffer of 10,000 rows is what it waits for. The row in memory is of a tenth of the rows:",
        "its memory grows with them, that of the others does not.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", nargs=3, metavar=("WAY", "PATH", "CACHE"))
    given = parser.parse_args()
    if given.side:
        way, path, cache = given.side
        print(json.dumps(side(way, given.model, path, cache)))
        return
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        whole, part, cache = Path(folder) / "rows.jsonl", Path(folder) / "part.jsonl", Path(folder) / "cache"
        write_rows(whole, given.rows)
        with whole.open() as rows:
            part.write_text("".join(islice(rows, given.rows // 10)))
        words = ("--model", given.model, "--side")
        found = []
        for name, way, path in (
            ("`data.cache`, the first time", "cache", whole), ("`data.cache`, again", "cache", whole),
            ("`data.stream`", "stream", whole), (f"in memory, {given.rows // 10:,} rows", "memory", part),
        ):  # fmt: skip
            found.append((name, apart(*words, way, str(path), str(cache))))
            print(name, found[-1][1], flush=True)
        kept = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e6
        text = page(found, given.rows, whole.stat().st_size / 1e6, kept, Path(given.model).name)
    if given.out:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
