"""Do several rules teach more than one, and corrected answers more than direct ones? SmolLM2-135M, with intervals.

    python tools/results/complex_instructions.py run --model SMOLLM2 --data ../shared/data --minutes 9
    python tools/results/complex_instructions.py table --model SMOLLM2 --data ../shared/data

Four sets of the same size, from the same tasks: instructions with one rule or with two or three, and answers that
keep all rules as the model gave them, or mended where it broke some. Instructions of several have three rules, and
where an answer keeps two of them, the third is taken out of its instruction: a small model hardly ever keeps three.
Each trains adapters by SFT; each is then asked instructions of one to five rules that stand in none of the sets, and
others of kinds of rules that no set has.
`--corrector` is the model that mends (the model itself without it: then "corrected" is self-correction under the
checks of programs). A stage that has finished is not made again; `--minutes` begins no further one after so much CPU
time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from recording import finished, options, rewrite, run_cells, verb

from steersman.flywheel.instruct import run as instruct
from steersman.jsonl import read_jsonl
from steersman.metrics import metric
from steersman.metrics.core import MetricInput
from steersman.statistics.estimates import bootstrap, mean
from steersman.verbs import generate, sft

HELD_OUT = ["startend:quotation", "detectable_content:postscript", "change_case:capital_word_frequency"]
SETS = {"one, direct": (1, False), "one, corrected": (1, True), "several, direct": (3, False),
        "several, corrected": (3, True)}  # fmt: skip
"""Rules of an instruction, and whether mended answers are among its rows."""
KEPT = 2
"""Rules that an answer to an instruction of several must keep; those that it breaks are taken out."""
RATE, EPOCHS, ASKED, TOKENS = 5e-4, 3, 96, 160


def rows_of(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path)


def tasks(data: Path, folder: Path) -> Path:
    """Tasks that need no input, one a line, from the seed tasks of self-instruct."""
    found = rows_of(data / "self_instruct/seed_tasks.jsonl")
    plain = [t["instruction"] for t in found if all(not i.get("input") for i in t["instances"])]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in plain))
    return path


def instructed(args: Any, name: str, least: int, most: int, count: int, seed: int, **more: Any) -> dict[str, Any]:
    """A run of the verb in a folder of its own."""
    return verb(
        instruct, instruct.InstructRecipe, args.out / name, seed,
        {
            "model": {"path": args.model}, "data": {"path": str(tasks(args.data, args.out))},
            "rules": {"least": least, "most": most, "held_out": HELD_OUT, "kept": min(KEPT, most)},
            "rollout": {
                "prompts": count, "samples": 2, "max_new_tokens": TOKENS, "held_out": ASKED,
                **more.pop("rollout", {}),
            },
            **more,
        },
    )  # fmt: skip


def corrector(args: Any) -> dict[str, Any]:
    return {"corrector": {"local": {"path": args.corrector or args.model, "max_tokens": TOKENS}}}


def trained(args: Any, name: str, seed: int) -> dict[str, Any]:
    """Adapters on as many rows as the smallest set has."""
    table = args.out / "sets" / f"{name.replace(', ', '-')}.jsonl"
    if not table.exists():
        chosen = sets(args)
        table.parent.mkdir(parents=True, exist_ok=True)
        for other, rows in chosen.items():
            text = "".join(json.dumps({k: r[k] for k in ("prompt", "completion")}) + "\n" for r in rows)
            (args.out / "sets" / f"{other.replace(', ', '-')}.jsonl").write_text(text)
    return verb(
        sft, sft.SFTRecipe, args.out / f"seed-{seed}" / table.stem, seed,
        {
            "model": {"path": args.model, "lora": {"r": 8}}, "data": {"path": str(table), "on_too_long": "drop"},
            "train": {"epochs": EPOCHS, "batch_size": 8}, "optimizer": {"lr": RATE, "schedule": "linear"},
            "run": {"eval_every": 1000},
        },
    )  # fmt: skip


def sets(args: Any) -> dict[str, list[dict[str, Any]]]:
    """The rows of each set, cut to the size of the smallest; corrected sets take mended answers first."""
    found = {}
    for name, (rules, mended) in SETS.items():
        rows = rows_of(args.out / f"rules-{rules}" / "sft.jsonl")
        direct = [r for r in rows if not r["corrected"]]
        found[name] = [r for r in rows if r["corrected"]] + direct if mended else direct
    size = min(map(len, found.values()))
    if size < 8:
        raise SystemExit(f"the smallest set has {size} rows; ask for more (--instructions) or take a better model")
    return {name: rows[:size] for name, rows in found.items()}


def answered(args: Any, model: str, name: str) -> None:
    """Greedy answers to the instructions of known and of held-out kinds."""
    for kind in ("known", "held-out"):
        out = args.out / "answers" / kind / f"{name}.jsonl"
        if out.exists():
            continue
        source = args.out / "asked" / ("grpo.jsonl" if kind == "known" else "held_out.jsonl")
        recipe = {
            "model": {"path": model}, "data": {"path": str(source), "limit": ASKED}, "out": str(out), "greedy": True,
            "rollout": {"max_new_tokens": TOKENS, "held_out": 0}, "run": {"threads": 1},
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        generate.run(generate.GenerateRecipe.model_validate(recipe))


def kept(path: Path) -> np.ndarray:
    """The share of its rules that each answer keeps."""
    rows = rows_of(path)
    columns = {key: [r[key] for r in rows] for key in ("instruction_id_list", "kwargs")}
    batch = MetricInput([r["completion"] for r in rows], [], columns=columns)
    return np.array(metric("ifeval").rows(batch))


def table(args: Any) -> dict[str, Any]:
    """Share of rules kept by kind of rule and set, with 95% intervals over instructions, and the two differences."""
    made: dict[str, Any] = {}
    for kind in ("known", "held-out"):
        found = {}
        for name in ("start", *SETS):
            files = sorted((args.out / "answers" / kind).glob(f"{name.replace(', ', '-')}*.jsonl"))
            if files:
                found[name] = np.mean([kept(file) for file in files], axis=0)
        row = {name: bootstrap(mean, [x]).plain() for name, x in found.items()}
        for said, more, less in (
            ("several less one, corrected", "several, corrected", "one, corrected"),
            ("several less one, direct", "several, direct", "one, direct"),
            ("corrected less direct, one", "one, corrected", "one, direct"),
            ("corrected less direct, several", "several, corrected", "several, direct"),
        ):
            if more in found and less in found:
                row[said] = bootstrap(mean, [found[more] - found[less]]).plain()
        made[kind] = row
    return made


def markdown(made: dict[str, Any]) -> str:
    lines = ["| | rules kept, known kinds | rules kept, held-out kinds |", "| --- | --- | --- |"]
    for name in made["known"]:
        cells = [made[k].get(name) for k in ("known", "held-out")]
        lines.append(f"| {name} | " + " | ".join(_cell(c) for c in cells) + " |")
    return "\n".join(lines)


def _cell(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def stages(args: Any) -> list[tuple[Path, Callable[[], Any]]]:
    """Everything in order, each with the folder that holds it once it is finished."""
    count, cells = args.instructions, []
    for rules in (1, 3):
        made = partial(instructed, args, f"rules-{rules}", rules, rules, count, 0, **corrector(args))
        cells.append((args.out / f"rules-{rules}", made))
    asked = partial(instructed, args, "asked", 1, 5, ASKED, 1, rollout={"max_new_tokens": 1, "samples": 1})
    cells.append((args.out / "asked", asked))
    cells.append((args.out / "never", partial(answered, args, args.model, "start")))
    for seed in args.seeds:
        for name in SETS:
            stem = name.replace(", ", "-")

            def cell(name: str = name, stem: str = stem, seed: int = seed) -> None:
                answered(args, trained(args, name, seed)["model"], f"{stem}-{seed}")

            cells.append((args.out / "never", cell))
    return cells


def main() -> None:
    parser = options(__doc__, ("run", "table"), "runs/complex-instructions", seeds=(0,))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--corrector")
    parser.add_argument("--instructions", type=int, default=240)
    args = parser.parse_args()
    if args.what == "run":
        whole = run_cells(stages(args), args.minutes)
        print("all stages are finished" if whole else "the same command goes on")
        return
    made = table(args)
    sizes = {name: len(rows) for name, rows in sets(args).items()}
    made |= {"rows": sizes, "start": finished(args.out / "rules-1")}
    (args.docs / "complex-instructions.json").write_text(json.dumps(made, indent=1) + "\n")
    rewrite(args.docs / "complex-instructions.md", markdown(made))


if __name__ == "__main__":
    main()
