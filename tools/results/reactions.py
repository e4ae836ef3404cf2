"""How far rules and models that read agree with an annotator on what users' turns say of the answers before them.

    python tools/results/reactions.py --data ../shared/data
    python tools/results/reactions.py --data ../shared/data --local MODEL
    python tools/results/reactions.py --data ../shared/data --url http://localhost:8000/v1 --model NAME

`recipes/data/reactions-labelled.jsonl` holds one annotator's labels of 200 turns of hh_rlhf (MIT) and oasst_trees
(Apache-2.0), by file, row and exchange; the texts are read from the sets. They were labelled without the rules'
verdicts in sight. Half of them were drawn among turns in which the rules find something, so that shares here are not
those of whole conversations.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from steersman.data import BadRows, DataConfig, section_rows
from steersman.flywheel.conversations import Exchange, exchanges
from steersman.flywheel.reactions import category
from steersman.flywheel.reading import read
from steersman.jsonl import read_jsonl
from steersman.judge.writer import Writer, WriterConfig
from steersman.statistics.agreement import cohen_kappa

LABELS = Path("recipes/data/reactions-labelled.jsonl")
THUMBS = {"praise": "up", "mixed": "neither", "none": "neither", "unread": "neither"}


def labelled(data: Path, file: Path = LABELS) -> list[tuple[Exchange, str]]:
    """The exchanges that were labelled, each with its kind."""
    rows = read_jsonl(file)
    wanted = {(r["file"], r["row"], r["exchange"]): r["kind"] for r in rows}
    files = sorted({str(data / r["set"] / r["file"]) for r in rows})
    found = []
    for row in section_rows(DataConfig(path=files), BadRows("skip")):
        name = Path(row.file).name
        if any((name, row.number, i) in wanted for i in range(40)):
            pairs = ((e, wanted.get((name, row.number, i))) for i, e in enumerate(exchanges(row)))
            found += [(e, kind) for e, kind in pairs if kind is not None]
    return found


def agreement(told: Sequence[str], labels: Sequence[str]) -> str:
    """Share and kappa of kinds, and of thumbs, with 95% bootstrap intervals of kappa."""
    out = []
    for name, turn in (("kinds", lambda k: k), ("thumbs", lambda k: THUMBS.get(k, "down"))):
        a, b = [turn(k) for k in told], [turn(k) for k in labels]
        rng, drawn = random.Random(0), []
        for _ in range(1000):
            rows = [rng.randrange(len(a)) for _ in a]
            drawn.append(cohen_kappa([a[i] for i in rows], [b[i] for i in rows]))
        low, high = sorted(drawn)[25], sorted(drawn)[974]
        same = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
        out.append(f"{name}: {same:.2f} the same, kappa {cohen_kappa(a, b):.2f} ({low:.2f} to {high:.2f})")
    return "; ".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--local")
    parser.add_argument("--url")
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("runs/reactions"))
    args = parser.parse_args()
    found = labelled(args.data)
    labels = [kind for _, kind in found]
    by_rules = [category(e.reaction, e.last_question) for e, _ in found]
    print(f"{len(found)} turns; by rules: {agreement(by_rules, labels)}")
    print(f"nothing but none: {agreement(['none'] * len(found), labels)}")
    if args.local or args.url:
        section = {"endpoint": {"url": args.url, "model": args.model}} if args.url else {
            "local": {"path": args.local, "max_tokens": 40}
        }  # fmt: skip
        readings = read([e for e, _ in found], Writer(WriterConfig.model_validate(section), args.out))
        told = ["unread" if r is None else r.kind for r in readings]
        print(f"by the model ({told.count('unread')} unread): {agreement(told, labels)}")


if __name__ == "__main__":
    main()
