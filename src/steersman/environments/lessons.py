"""Recorded episodes as rows that `dpo` and `kto` read: only what the policy said counts there, as it did here.

    python -m steersman.environments.lessons runs/game pairs.jsonl
    python -m steersman.environments.lessons runs/game labels.jsonl --above 0.5

A run's `samples.jsonl` holds the episodes of its looks at held-out prompts, with each part of their reward; the
weights of the parts stand in its `config.yaml`. Pairs are made of one prompt's best and worst episode over all looks,
with the difference of their rewards as `margin`; with `--above` every episode becomes a row with a thumb, up where
its reward is above that. Episodes in several segments are recorded as their last one. A chat template lays the turns
out, so the model needs one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from steersman.atomic import check_places, write_atomic
from steersman.config.recipe_text import load_yaml
from steersman.guards.terminal import say
from steersman.jsonl import jsonl_text, read_jsonl
from steersman.types import SteersmanError

Row = dict[str, Any]


def episodes(run: Path) -> list[Row]:
    """The recorded episodes of a run folder, each with its reward, the weighted sum of the parts, as `total`.

    Raises SteersmanError where there are none, and where the run's recipe has no weight for a part.
    """
    path = run / "samples.jsonl"
    if not path.is_file():
        raise SteersmanError(f"{run}: there is no samples.jsonl; give the folder of a run with rollout.held_out")
    found = [row for row in read_jsonl(path) if row.get("talk")]
    if not found:
        raise SteersmanError(f"{path}: it holds no episodes of several turns; the run had no section `environment`")
    weights = _weights(run)
    for row in found:
        for name in row["reward"]:
            if name not in weights:
                raise SteersmanError(
                    f"{path}: its episodes were rewarded by {name!r}, and {run / 'config.yaml'} has no such part of "
                    "the reward, so its weight is not known; put the run's config.yaml there"
                )
    return [row | {"total": sum(weights[name] * float(x) for name, x in row["reward"].items())} for row in found]


def _weights(run: Path) -> dict[str, float]:
    path = run / "config.yaml"
    if not path.is_file():
        raise SteersmanError(f"{run}: there is no config.yaml, which has the weights of the reward; put it there")
    parts = load_yaml(path.read_text(encoding="utf-8"))["reward"]["parts"]
    return {name: float(part["weight"]) for name, part in parts.items()}


def pairs(rows: Iterable[Row]) -> list[Row]:
    """The best and the worst episode of each beginning, where what was said and their rewards differ."""
    by_beginning: dict[str, list[Row]] = {}
    for row in rows:
        by_beginning.setdefault(json.dumps(row["asked"], sort_keys=True), []).append(row)
    made = []
    for some in by_beginning.values():
        best, worst = max(some, key=itemgetter("total")), min(some, key=itemgetter("total"))
        margin = best["total"] - worst["total"]
        if margin > 0 and best["talk"] != worst["talk"]:
            made.append(
                {"prompt": best["asked"], "chosen": best["talk"], "rejected": worst["talk"], "margin": margin}
            )
    return made


def labels(rows: Iterable[Row], above: float) -> list[Row]:
    """Every episode with a thumb: up where its reward is above `above`."""
    return [{"prompt": r["asked"], "completion": r["talk"], "label": r["total"] > above} for r in rows]


def main(words: Sequence[str]) -> int:
    """The command line; 2 for what a user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--above", type=float)
    args = parser.parse_args(words)
    try:
        check_places(args.target)
        rows = episodes(args.run)
        made = pairs(rows) if args.above is None else labels(rows, args.above)
        write_atomic(args.target, jsonl_text(made))
    except SteersmanError as error:
        say(str(error))
        return 2
    print(f"{len(made)} rows in {args.target}, from {len(rows)} episodes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
