"""How the time per token grows: with batch, length, vocabulary and group size, of rollout and of training passes.

    python benchmarks/growth.py [--repeats 3] [--threads 2]

The exponent is the slope of log(time per token) against log(size), by least squares. What the algorithm must: a
bigger batch or group costs no more per token (at most 0), attention grows with the length (at most 1), the output
layer with the vocabulary (at most 1).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from duel import about, parser, write
from transformers import LlamaConfig, LlamaForCausalLM

from steersman.model import Policy
from steersman.rollout import Engine, Sampling
from steersman.types import Prompt, Tokens

MUST = {"batch": 0.0, "group": 0.0, "length": 1.0, "vocabulary": 1.0}


def build(vocab: int = 4096) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def training(model: LlamaForCausalLM, rows: int, length: int, group: int = 1) -> Callable[[], int]:
    """Forward and backward of log-probabilities; a third of the length is prompt."""
    draw = torch.Generator().manual_seed(1)
    prompt = length // 3
    prompts = torch.randint(3, 4096, (rows // group, prompt), generator=draw).repeat_interleave(group, 0)
    answers = torch.randint(3, 4096, (rows, length - prompt), generator=draw)
    tokens = Tokens.from_ids(prompts.tolist(), answers.tolist()).to(model.device)
    policy = Policy(model, None)

    def run() -> int:
        policy.logp(tokens).logp.sum().backward()
        model.zero_grad()
        return rows * length

    return run


def rollout(model: LlamaForCausalLM, rows: int, length: int, group: int = 1) -> Callable[[], int]:
    """A third of the length is prompt; no end token."""
    draw = torch.Generator().manual_seed(1)
    prompt = length // 3
    ids = torch.randint(3, 4096, (rows // group, prompt), generator=draw).tolist()
    engine, new = Engine(model, eos_token_id=[]), length - prompt
    prompts = [Prompt(row, "", index=i) for i, row in enumerate(ids)]

    def run() -> int:
        return sum(len(s.ids) for s in engine.generate(prompts, Sampling(new), n=group, seed=0))

    return run


def per_token(run: Callable[[], int], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = run()
        times.append((time.perf_counter() - start) / tokens)
    return min(times)


def slope(sizes: list[int], times: list[float]) -> float:
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main() -> None:
    args = parser(__doc__ or "", []).parse_args()
    torch.set_num_threads(args.threads)
    model = build().to(args.device)
    series: list[tuple[str, str, list[int], Callable[[int], Callable[[], int]]]] = [
        ("training", "batch", [8, 16, 32, 64], lambda n: training(model, n, 96)),
        ("training", "length", [96, 192, 384, 768], lambda n: training(model, 3072 // n, n)),
        ("training", "vocabulary", [4096, 16384, 65536], lambda n: training(build(n).to(args.device), 16, 96)),
        ("training", "group", [1, 2, 4, 8], lambda n: training(model, 32, 192, n)),
        ("rollout", "batch", [8, 16, 32, 64], lambda n: rollout(model, n, 96)),
        ("rollout", "length", [96, 192, 384], lambda n: rollout(model, 16, n)),
        ("rollout", "vocabulary", [4096, 16384, 65536], lambda n: rollout(build(n).to(args.device), 16, 48)),
        ("rollout", "group", [1, 2, 4, 8], lambda n: rollout(model, 32, 192, n)),
    ]
    results = []
    for side, axis, sizes, make in series:
        times = [per_token(make(n), args.repeats) for n in sizes]
        found = {"side": side, "axis": axis, "sizes": sizes, "microseconds_per_token": [t * 1e6 for t in times],
                 "exponent": slope(sizes, times), "at_most": MUST[axis]}  # fmt: skip
        results.append(found)
        told = ", ".join(f"{n}: {t * 1e6:.1f}" for n, t in zip(sizes, times, strict=True))
        print(f"{side:9} {axis:10} exponent {found['exponent']:+.2f} (at most {MUST[axis]:.0f})   us/token {told}")
    print(write(args, "growth", {**about(args, {}), "results": results}))


if __name__ == "__main__":
    main()
