"""Tokens per second of steersman's engine beside transformers' own `generate`, in one process, alternating.

    python benchmarks/rollout.py [--models stories260k llama5m llama36m] [--scenarios fixed mixed groups]
                                 [--threads 2] [--repeats 3] [--json out.json]

Scenarios: `fixed`, 64 prompts of 32 tokens and 128 new tokens each; `mixed`, the same where responses end at an
end token (random models: a set of ids that together have probability 1/32; stories260k: the full stop), at most
128; `groups`, 8 prompts sampled 8 times each, 128 new tokens. Both sides sample at temperature 1 without
truncation and count the tokens up to and including the end. The table gives medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from steersman.rollout import Engine, Sampling
from steersman.types import Prompt

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260k" / "hf"
SHAPES = {"llama5m": (256, 4, 688), "llama36m": (512, 8, 1376)}
PROMPT, NEW, BATCH = 32, 128, 64
FULL_STOP = 426  # of stories260k's tokenizer


def load(name: str) -> tuple[Any, list[int]]:
    """A model and its end tokens for the mixed scenario."""
    if name == "stories260k":
        return AutoModelForCausalLM.from_pretrained(STORIES).eval(), [1, 2, FULL_STOP]
    hidden, layers, inner = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval(), list(range(100, 228))


def prompt_ids(model: Any, scenario: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    rows = 8 if scenario == "groups" else BATCH
    ids = torch.randint(3, model.config.vocab_size, (rows, PROMPT), generator=random)
    ids[:, 0] = 1
    return ids.to(model.device)


def peer(model: Any, ids: torch.Tensor, n: int, ends: list[int]) -> Callable[[int], int]:
    """transformers' generate; returns the number of tokens up to each response's end."""
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW, num_return_sequences=n,
        eos_token_id=ends or None, pad_token_id=0,
    )  # fmt: skip

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[:, PROMPT:]
        hit = torch.isin(out, torch.tensor(ends, dtype=torch.long, device=out.device))
        before = (hit.cumsum(1) - hit.long()) == 0
        return int(before.sum())

    return run


def ours(model: Any, ids: torch.Tensor, n: int, ends: list[int]) -> Callable[[int], int]:
    engine = Engine(model, eos_token_id=ends)
    prompts = [Prompt(row, "", index=i) for i, row in enumerate(ids.tolist())]
    sampling = Sampling(NEW)

    def run(seed: int) -> int:
        return sum(len(s.ids) for s in engine.generate(prompts, sampling, n=n, seed=seed))

    return run


def compare(name: str, scenario: str, repeats: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    model, ends = load(name)
    model = model.to(device=device, dtype=dtype)
    ends = ends if scenario == "mixed" else []
    ids, n = prompt_ids(model, scenario), 8 if scenario == "groups" else 1
    runs = {"generate": peer(model, ids, n, ends), "steersman": ours(model, ids, n, ends)}
    rates: dict[str, list[float]] = {side: [] for side in runs}
    for repeat in range(repeats + 1):
        for side, run in runs.items():
            start = time.perf_counter()
            tokens = run(repeat)
            rate = tokens / (time.perf_counter() - start)
            if repeat:  # the first pair warms up
                rates[side].append(rate)
    median = {side: statistics.median(values) for side, values in rates.items()}
    return {
        "model": name,
        "scenario": scenario,
        "tokens_per_second": median,
        "ratio": median["steersman"] / median["generate"],
        "ratios": [b / a for a, b in zip(rates["generate"], rates["steersman"], strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["stories260k", "llama5m"])
    parser.add_argument("--scenarios", nargs="+", default=["fixed", "mixed", "groups"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    results = []
    print(f"{'model':12} {'scenario':8} {'generate':>10} {'steersman':>10} {'ratio':>6}   tokens per second, medians")
    for name in args.models:
        if name == "stories260k" and not STORIES.is_dir():
            print(f"{name:12} not found at {STORIES}, left out")
            continue
        for scenario in args.scenarios:
            result = compare(name, scenario, args.repeats, args.device, getattr(torch, args.dtype))
            results.append(result)
            rate = result["tokens_per_second"]
            print(
                f"{name:12} {scenario:8} {rate['generate']:10.0f} {rate['steersman']:10.0f} "
                f"{result['ratio']:6.2f}   {', '.join(f'{r:.2f}' for r in result['ratios'])}",
                flush=True,
            )
    if args.json is not None:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.processor() or platform.machine(),
            "threads": args.threads,
            "device": args.device,
            "dtype": args.dtype,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
