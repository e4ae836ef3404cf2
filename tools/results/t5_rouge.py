"""A T5 from scratch, trained with PPO toward ROUGE-L on CommonGen: its data, its runs and its record.

    python tools/results/t5_rouge.py prepare --data ../shared/data --out runs/t5-rouge
    python tools/results/t5_rouge.py run --out runs/t5-rouge --seeds 0 1 2
    python tools/results/t5_rouge.py draw --out runs/t5-rouge --docs docs/results --seeds 0 1 2

A run that has finished is not made again; `--minutes` begins no further run after that time.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from recording import finished, options, over_seeds, plain_axes, plt, rows_of, run_cells, verb
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from steersman.grue.task import in_split
from steersman.jsonl import jsonl_text
from steersman.verbs import rl, sft
from steersman.verbs.on_policy_recipes import RECIPES

VOCABULARY, OFTEN = 2500, 20
RECIPE_FOLDER = Path(__file__).parents[2] / "recipes" / "results"
SHOWN = ("reward/rougeL", "reward/coverage", "distinct2", "length", "perplexity", "kl")
EMPTY = (
    "a an the of in on with and to is are at for from by as his her their its this that it he she they into while "
    "be was over up out down"
)
"""Words that say too little to be given as a concept."""


def prepare(data: Path, out: Path) -> None:
    """Rows for both supervised stages, prompts with all their references for PPO, and a tokenizer.

    Kept are sets whose every concept is in at least OFTEN sets; a twentieth of the sets, by a hash, is held out.
    """
    out.mkdir(parents=True, exist_ok=True)
    sets = often(concept_sets(data))
    held = [concepts for concepts in sets if in_split(concepts, "validation", 0.05)]
    random.Random(0).shuffle(held)  # a run measures on the first of them
    taught = [concepts for concepts in sets if in_split(concepts, "train", 0.05)]
    pairs = [(concepts, text) for concepts in taught for text in sets[concepts]]
    rng = random.Random(0)
    own = [own_words(text, rng) for _, text in pairs]
    again = [own_words(text, rng) for _, text in pairs]
    words = sorted({word for concepts in sets for word in concepts.split()})
    copies = [(said, said) for said in (" ".join(rng.sample(words, rng.randint(1, 3))) for _ in range(12800))]
    write(out / "warm.jsonl", rows_for([*copies, *own]))
    write(out / "train.jsonl", rows_for([*pairs, *again]))
    write(out / "dev.jsonl", rows_for([(concepts, text) for concepts in held for text in sets[concepts]]))
    for name, kept in (("prompts", taught), ("dev_prompts", held)):
        rows = [{"concepts": c, "words": c.split(), "references": sets[c]} for c in kept]
        write(out / f"{name}.jsonl", rows)
    tokenizer([text for pair in pairs for text in pair]).save_pretrained(out / "tokenizer")


def concept_sets(data: Path) -> dict[str, list[str]]:
    """The concepts of each set, and its sentences."""
    sets: dict[str, list[str]] = {}
    for split in ("train", "dev"):
        source, target = (
            (data / "commongen" / f"commongen.{split}.{side}.txt").read_text().splitlines()
            for side in ("src_alpha", "tgt")
        )
        for concepts, sentence in zip(source, target, strict=True):
            sets.setdefault(concepts, []).append(sentence)
    return sets


def often(sets: dict[str, list[str]]) -> dict[str, list[str]]:
    count = Counter(word for concepts in sets for word in concepts.split())
    return {c: texts for c, texts in sets.items() if all(count[word] >= OFTEN for word in c.split())}


def own_words(text: str, rng: random.Random) -> tuple[str, str]:
    """Three to six of a sentence's own words, in alphabetical order, and the sentence."""
    words = sorted(set(re.findall("[a-z]+", text.lower())) - set(EMPTY.split()))
    chosen = rng.sample(words, min(len(words), rng.randint(3, 6)))
    return " ".join(sorted(chosen)) or "nothing", text


def rows_for(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"concepts": concepts, "completion": text} for concepts, text in pairs]


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Pieces of lower-case words, punctuation apart, so that most concepts are one token in source and sentence."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    inner.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    inner.train_from_iterator([*texts, "sentence with:"], trainer)
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(jsonl_text(rows))


def run(out: Path, seeds: list[int], minutes: float) -> None:
    cells = []
    for name in ("warm", "sft"):
        made = partial(verb, sft, sft.SFTRecipe, out / name, 0, values(out, f"t5-rouge-{name}"))
        cells.append((out / name, made))
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
    parser = options(__doc__, ("prepare", "run", "draw"), "runs/t5-rouge", minutes=60.0)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    asked = parser.parse_args()
    if asked.what == "prepare":
        prepare(asked.data, asked.out)
    elif asked.what == "run":
        run(asked.out, asked.seeds, asked.minutes)
    else:
        draw(asked.out, asked.docs, asked.seeds)


if __name__ == "__main__":
    main()
