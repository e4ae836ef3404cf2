"""A T5 from scratch, trained with PPO toward ROUGE-L on CommonGen: its data, its runs and its record.

    python tools/results/t5_rouge.py prepare --data ../shared/data --out runs/t5-rouge
    python tools/results/t5_rouge.py run --out runs/t5-rouge --seeds 0 1 2
    python tools/results/t5_rouge.py draw --out runs/t5-rouge --docs docs/results --seeds 0 1 2

A run that has finished is not made again; `--minutes` begins no further run after that time.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from recording import finished, over_seeds, plain_axes, plt, rows_of, run_cells, verb
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from steersman.train import rl, sft
from steersman.train.verbs import RECIPES

VOCABULARY, ROWS = 1200, {"train": None, "dev": 1000}
RECIPE_FOLDER = Path(__file__).parents[2] / "recipes" / "results"
SHOWN = ("reward/rougeL", "reward/coverage", "distinct2", "length", "perplexity", "kl")


def prepare(data: Path, out: Path) -> None:
    """Rows for SFT, prompts with all their references for PPO, and a tokenizer that ends texts as T5's does."""
    out.mkdir(parents=True, exist_ok=True)
    for split, answers, prompts in (("train", "train", "prompts"), ("dev", "dev", "dev_prompts")):
        source, target = (
            (data / "commongen" / f"commongen.{split}.{side}.txt").read_text().splitlines()
            for side in ("src_alpha", "tgt")
        )
        sets: dict[str, list[str]] = {}
        for concepts, sentence in zip(source, target, strict=True):
            sets.setdefault(concepts, []).append(sentence)
        rows = zip(source, target, strict=True)
        write(out / f"{answers}.jsonl", [{"concepts": c, "completion": s} for c, s in list(rows)[: ROWS[split]]])
        write(
            out / f"{prompts}.jsonl", [{"concepts": c, "words": c.split(), "references": s} for c, s in sets.items()]
        )
        if split == "train":
            tokenizer([*source, *target]).save_pretrained(out / "tokenizer")


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    inner.train_from_iterator([*texts, "sentence with:"], trainer)
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def run(out: Path, seeds: list[int], minutes: float) -> None:
    first = partial(verb, sft, sft.SFTRecipe, out / "sft", 0, values(out, "t5-rouge-sft"))
    cells = [(out / "sft", first)]
    for seed in seeds:
        folder = out / f"ppo-{seed}"
        cells.append((folder, partial(verb, rl, RECIPES["ppo"], folder, seed, values(out, "t5-rouge-ppo"))))
    run_cells(cells, minutes)


def values(out: Path, name: str) -> dict[str, Any]:
    """The recipe as it stands in the project, with its folders under `out`."""
    recipe = yaml.safe_load((RECIPE_FOLDER / f"{name}.yaml").read_text().replace("runs/t5-rouge", str(out)))
    recipe["run"].pop("dir")
    return recipe


def draw(out: Path, docs: Path, seeds: list[int]) -> None:
    """The record's numbers and picture, and a few answers to read."""
    runs = {seed: rows_of(out / f"ppo-{seed}") for seed in seeds if finished(out / f"ppo-{seed}")}
    looks = {seed: [r for r in rows if "held_out/reward/rougeL" in r] for seed, rows in runs.items()}
    numbers = {
        name: {
            when: over_seeds([look[at][f"held_out/{name}"] for look in looks.values()])
            for when, at in (("before", 0), ("after", -1))
        }
        for name in SHOWN
    }
    first_gap = [next(r["ratio_gap"] for r in rows if "ratio_gap" in r) for rows in runs.values()]
    record = {"seeds": list(runs), "held_out": numbers, "first ratio gap": over_seeds(first_gap)}
    last = [r for r in rows_of(out / "sft") if "held_out/loss" in r][-1]
    record["sft"] = {k: round(last[k], 4) for k in ("held_out/loss", "held_out/perplexity")}
    (docs / "t5-rouge.json").write_text(json.dumps(record, indent=1) + "\n")
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8))
    titles = ("ROUGE-L, held out", "concepts covered, held out (not paid)", "tokens per answer, held out")
    for axis, name, title in zip(axes, ("reward/rougeL", "reward/coverage", "length"), titles, strict=True):
        for seed, look in looks.items():
            axis.plot([r["step"] for r in look], [r[f"held_out/{name}"] for r in look], label=f"seed {seed}")
        plain_axes(axis, title)
        axis.set_xlabel("iteration", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(docs / "t5-rouge.png", dpi=110)
    print(json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run", "draw"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/t5-rouge"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=60.0)
    asked = parser.parse_args()
    if asked.command == "prepare":
        prepare(asked.data, asked.out)
    elif asked.command == "run":
        run(asked.out, asked.seeds, asked.minutes)
    else:
        draw(asked.out, asked.docs, asked.seeds)


if __name__ == "__main__":
    main()
