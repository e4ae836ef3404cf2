"""A mini model with a letter tokenizer, recipes of the loops on it, and what two runs are compared by."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = ["<unk>", "<s>", "</s>", *string.ascii_lowercase, " ", ".", ",", "\n", "!", "?"]
WORDS = [
    "the cat",
    "a dog sat",
    "we",
    "look at",
    "no",
    "she said so",
    "hm,",
    "it is",
    "you and me",
    "oh",
    "up",
    "far",
]


def save_mini(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loop_settings(folder: Path, model: Path, run: str, **extra: Any) -> dict[str, Any]:
    """12 prompts, 3 of them held out; 2 rounds of 4 prompts; the judge counts the letter a."""
    data = jsonl(folder / "prompts.jsonl", [{"prompt": w} for w in WORDS])
    (folder / "rewards.py").write_text(
        "def count_a(prompts, completions):\n    return [float(c.count('a') - c.count('e')) for c in completions]\n"
    )
    return {
        "model": {"path": str(model)},
        "data": {"path": str(data)},
        "judge": {"reward": {"a": {"function": f"{folder / 'rewards.py'}:count_a"}}},
        "watch": {"words": {"builtin": "length"}},
        "rollout": {"prompts": 4, "samples": 3, "max_new_tokens": 10, "held_out": 3, "max_batch": 2},
        "unfinished": "keep",
        "rounds": 2,
        "run": {"dir": str(folder / run), "threads": 1, "save_every": 1, "eval_every": 1},
        **extra,
    }


def left(run: Path) -> dict[str, Any]:
    """All data, provenance, weights and numbers that a run left; times and absolute paths aside."""
    out: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        inside_stage = any((folder / "config.yaml").exists() for folder in path.parents if folder != run)
        if path.name == "metrics.jsonl":
            timed = ("seconds", "time/", "throughput")
            out[name] = [{k: v for k, v in r.items() if not k.startswith(timed)} for r in rows_of(path)]
        elif path.suffix == ".safetensors":
            out[name] = {k: x.tolist() for k, x in load_file(path).items()}
        elif (path.suffix in (".jsonl", ".json") and not inside_stage) and path.name != "summary.json":
            out[name] = path.read_text()
        elif path.suffix == ".parts" or path.name.startswith(".tmp-"):
            out[name] = "left over"
    return out
