"""Tokens per second of a rollout with LoRA: adapters computed beside their layers, and added into them, alternating.

    python benchmarks/adapters.py MODEL [--rows 1 4 16] [--new 48] [--r 16] [--threads 1] [--repeats 3]

One process, one policy with adapters that are not zero; the first run of each is not counted. Prompts are chat turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import torch

from steersman.model import LoraConfig, Policy, load_policy
from steersman.model.fast.folded import folded, folded_bytes
from steersman.rollout import Engine, Sampling, decoder
from steersman.types import Prompt

QUESTION = "Name three colours of the sea, and say when it has them."


def policy_of(path: str, r: int) -> Policy:
    policy = load_policy(path, lora=LoraConfig(r=r, alpha=2.0 * r))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    return policy


def speed(engine: Engine, prompts: list[Prompt], new: int, *, fold: bool) -> float:
    decoder.folded = folded if fold else lambda _: nullcontext()
    start = time.monotonic()
    samples = engine.generate(prompts, Sampling(new, min_new_tokens=new), seed=0)
    decoder.folded = folded
    return sum(len(s.ids) for s in samples) / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    for name, value in (("new", 48), ("r", 16), ("threads", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    policy = policy_of(given.model, given.r)
    chat = [{"role": "user", "content": QUESTION}]
    ids = policy.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    engine = Engine(policy.model, policy.tokenizer)
    print(f"{folded_bytes(policy.model) / 2**20:.0f} MiB of weights with adapters added in; {given.threads} threads")
    print("| rows | beside, tokens/s | added in, tokens/s | ratio |\n| ---: | ---: | ---: | ---: |")
    for rows in given.rows:
        prompts = [Prompt(ids, "", index=i) for i in range(rows)]
        runs = [[speed(engine, prompts, given.new, fold=fold) for fold in (False, True)]
                for _ in range(given.repeats + 1)][1:]  # fmt: skip
        beside, added = (statistics.median(side) for side in zip(*runs, strict=True))
        ratio = statistics.median(b / a for a, b in runs)
        print(f"| {rows} | {beside:.0f} | {added:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
