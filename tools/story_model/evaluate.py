"""Held-out nats per character of story models, on the same characters, and sampling speed.

    python tools/story_model/evaluate.py runs/story-model/run/model ../shared/data/stories260k/hf \
        --held-out runs/story-model/held_out.jsonl

Only stories that fit every model's context count. The first token is the model's own start of a story, which
costs nothing; the end of a story is not counted, since not every model writes it the same way.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.rollout import Engine, Sampling
from steersman.types import Prompt


def ids_of(tokenizer, text: str) -> list[int]:
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids]


@torch.no_grad()
def nats(model, ids: list[int]) -> float:
    row = torch.tensor([ids])
    return float(cross_entropy(model(row).logits[0, :-1].float(), row[0, 1:], reduction="sum"))


def speed(model, tokenizer, batch: int = 64, new: int = 128) -> float:
    """Sampled tokens per second at temperature 1."""
    engine = Engine(model, tokenizer, max_batch=batch)
    prompt = Prompt(ids=[tokenizer.bos_token_id], text="")
    sampling = Sampling(max_new_tokens=new, min_new_tokens=new)
    engine.generate([prompt], Sampling(max_new_tokens=4), n=batch)
    began = time.perf_counter()
    made = engine.generate([prompt], sampling, n=batch)
    return sum(len(s.ids) for s in made) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    stories = [json.loads(line)["text"] for line in args.held_out.open(encoding="utf-8")]
    loaded = []
    for path in args.models:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        loaded.append((path, model.eval(), tokenizer))
        limit = model.config.max_position_embeddings
        stories = [s for s in stories if len(ids_of(tokenizer, s)) <= limit]
    characters = sum(map(len, stories))
    print(f"{len(stories)} held-out stories, {characters} characters")
    for path, model, tokenizer in loaded:
        rows = [ids_of(tokenizer, s) for s in stories]
        total, tokens = sum(nats(model, row) for row in rows), sum(len(row) - 1 for row in rows)
        print(
            f"{path}: {model.num_parameters():,} parameters, {total / characters:.4f} nats per character, "
            f"{total / tokens:.4f} per token, {speed(model, tokenizer):.0f} sampled tokens/s at batch 64"
        )


if __name__ == "__main__":
    main()
