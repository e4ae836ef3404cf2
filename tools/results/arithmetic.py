"""Sums by pupils who make mistakes, and reinforcement learning that mends them.

    python tools/results/arithmetic.py data --out runs/arithmetic
    steersman sft recipes/arithmetic-sft.yaml
    steersman grpo recipes/arithmetic-grpo.yaml

    python tools/results/arithmetic.py run --seeds 0 1 2
    python tools/results/arithmetic.py draw --docs docs/results --seeds 0 1 2

`data` writes a tokenizer of single characters and three tables of sums such as 37+8:
`demonstrations.jsonl` with the answers of pupils who mostly forget to carry and sometimes slip, `problems.jsonl` with
the right ones, for the reward, and `held_out.jsonl`, which no stage trains on. `run` begins no further run after
`--minutes` of CPU time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from recording import finished, options, over_seeds, plain_axes, plt, rows_of, run_cells, verb
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from steersman.algorithms import ALGORITHMS
from steersman.jsonl import jsonl_text, read_jsonl
from steersman.verbs import rl
from steersman.verbs.on_policy_recipes import RECIPES as VERBS

RECIPE = Path("recipes/arithmetic-grpo.yaml")
METHODS = ("grpo", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++")
FORGETS, SLIPS = 0.8, 0.3
"""How often a pupil forgets a carry, and how often the last step is off by one."""
HELD_OUT, DEMONSTRATIONS = 200, 20_000
SYMBOLS = ["<unk>", "<s>", "</s>", *"0123456789+="]


def pupil(a: int, b: int, rng: random.Random) -> int:
    """What a pupil writes for a + b."""
    carries = a % 10 + b >= 10
    answer = a + b - (10 if carries and rng.random() < FORGETS else 0)
    return answer + (rng.choice((-1, 1)) if rng.random() < SLIPS else 0)


def write_data(out: Path) -> None:
    """The tokenizer and the three tables; always the same ones."""
    rng = random.Random(0)
    sums = [(a, b) for a in range(100) for b in range(10)]
    rng.shuffle(sums)
    held, known = sums[:HELD_OUT], sums[HELD_OUT:]
    shown = [known[i % len(known)] for i in range(DEMONSTRATIONS)]
    out.mkdir(parents=True, exist_ok=True)
    answers = [max(pupil(a, b, rng), 0) for a, b in shown]
    tables = {
        "demonstrations": [
            {"prompt": f"{a:02}+{b}=", "completion": str(given)} for (a, b), given in zip(shown, answers, strict=True)
        ],
        "problems": [{"prompt": f"{a:02}+{b}=", "answer": str(a + b)} for a, b in known],
        "held_out": [{"prompt": f"{a:02}+{b}=", "answer": str(a + b)} for a, b in held],
    }
    for name, rows in tables.items():
        (out / f"{name}.jsonl").write_text(jsonl_text(rows))
    character_tokenizer().save_pretrained(out / "tokenizer")
    right = sum(given == a + b for (a, b), given in zip(shown, answers, strict=True)) / len(shown)
    print(f"{out}: {len(known)} sums, {len(held)} held out; {right:.1%} of the demonstrations are right")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, a BOS in front."""
    inner = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def train(method: str, folder: Path, seed: int) -> dict[str, Any]:
    """One run of the recipe under another method."""
    values = yaml.safe_load(RECIPE.read_text())
    return verb(rl, VERBS[method], folder, seed, {**values, "run": {**values["run"], "dir": str(folder)}})


def collect(out: Path, seeds: list[int]) -> dict[str, Any]:
    """Held-out accuracy, sampled, before and after; and the highest look on the way."""
    table: dict[str, Any] = {"seeds": seeds}
    for method in METHODS:
        folders = [folder for seed in seeds if finished(folder := out / f"seed-{seed}" / method)]
        runs = [finished(folder) or {} for folder in folders]
        if runs:
            table[method] = {
                "before": over_seeds([s["reward/total_before"] for s in runs]),
                "after": over_seeds([s["reward/total_after"] for s in runs]),
                "best": over_seeds([max(y for _, y in looks(folder)) for folder in folders]),
                "kl": over_seeds([s["kl_after"] for s in runs]),
                "seconds": over_seeds([s["seconds"] for s in runs]),
            }
    return table


def looks(folder: Path) -> list[tuple[int, float]]:
    """(iteration, accuracy on the held-out sums)."""
    return [(r["step"], r["held_out/reward/total"]) for r in rows_of(folder) if "held_out/reward/total" in r]


def by_carry(folder: Path) -> dict[str, tuple[float, float]]:
    """Held-out accuracy before and after training, of sums without and with a carry."""
    rows = read_jsonl(folder / "samples.jsonl")
    last = max(row["step"] for row in rows)

    def share(step: int, carry: bool) -> float:
        a_b = [(row["prompt"].rstrip("=").split("+"), row) for row in rows if row["step"] == step]
        right = [row["reward"]["right"] for (a, b), row in a_b if (int(a[-1]) + int(b[-1]) >= 10) == carry]
        return mean(right)

    return {name: (share(0, carry), share(last, carry)) for name, carry in (("no carry", False), ("carry", True))}


def draw(out: Path, seeds: list[int], file: Path) -> None:
    """Accuracy against iterations: the mean of every method, and its seeds."""
    figure, axes = plt.subplots(1, len(METHODS), figsize=(12, 2.5), sharey=True, layout="constrained")
    for axis, method in zip(axes, METHODS, strict=True):
        runs = [looks(folder) for seed in seeds if finished(folder := out / f"seed-{seed}" / method)]
        for run in runs:
            axis.plot(*zip(*run, strict=True), color="#1f5f8b", lw=0.9, alpha=0.6)
        plain_axes(axis, ALGORITHMS[method].title)
        axis.set_ylim(0, 1)
        axis.set_xlabel("iteration", fontsize=8)
    axes[0].set_ylabel("right, held-out sums", fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = options(__doc__, ("data", "run", "draw"), "runs/arithmetic")
    args = parser.parse_args()
    if args.what == "data":
        write_data(args.out)
    elif args.what == "run":
        cells: list[tuple[Path, Callable[[], Any]]] = []
        for seed in args.seeds:
            for method in METHODS:
                folder = args.out / f"seed-{seed}" / method
                cells.append((folder, partial(train, method, folder, seed)))
        run_cells(cells, args.minutes)
    else:
        table = collect(args.out, args.seeds)
        table["grpo by carry"] = [by_carry(args.out / f"seed-{seed}" / "grpo") for seed in args.seeds]
        (args.docs / "arithmetic.json").write_text(json.dumps(table, indent=1) + "\n")
        print(json.dumps(table, indent=1))
        draw(args.out, args.seeds, args.docs / "arithmetic.png")


if __name__ == "__main__":
    main()
