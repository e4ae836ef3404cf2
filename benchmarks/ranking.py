"""K answers of one prompt in one forward, beside their pairs one by one: the same loss and gradient, how much sooner.

    python benchmarks/ranking.py                 # prints a table
    python benchmarks/ranking.py --record        # and writes docs/results/ranking.json

One training step (forward and backward) on the included story model. "Pairs one by one" runs every pair of the
ranking through the model by itself, as a trainer of pairs does with a ranking that was written out as pairs;
"pairs in one batch" runs them all at once, so that only the repeated answers cost.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from itertools import combinations
from pathlib import Path

import torch

from steersman.assets import story_model
from steersman.data import Encoded, collate_groups, collate_pairs
from steersman.loss.reward import pairwise, ranking
from steersman.model import ScalarModel, load_scalar

ROOT = Path(__file__).resolve().parents[1]


def answers(k: int, prompt: int, response: int, vocabulary: int) -> list[Encoded]:
    """K answers of one prompt, of random tokens and of lengths from half to all of `response`."""
    draw = torch.Generator().manual_seed(k)
    start = torch.randint(3, vocabulary, (prompt,), generator=draw).tolist()
    made = []
    for i in range(k):
        n = response - (response // 2) * i // max(k - 1, 1)
        ids = torch.randint(3, vocabulary, (n,), generator=draw).tolist()
        made.append(Encoded(start, ids, [True] * n))
    return made


def in_one_forward(model: ScalarModel, group: list[Encoded]) -> torch.Tensor:
    tokens, _ = collate_groups([group])
    score = model.score(tokens)[None]
    rank = torch.arange(len(group))[None]
    loss = ranking(score, rank, torch.ones_like(rank, dtype=torch.bool)).sum()
    loss.backward()
    return loss.detach()


def pairs_one_by_one(model: ScalarModel, group: list[Encoded]) -> torch.Tensor:
    pairs, total = list(combinations(group, 2)), torch.zeros(())
    for pair in pairs:
        chosen, rejected = model.score(collate_pairs([pair])).chunk(2)
        loss = pairwise(chosen, rejected).sum() / len(pairs)
        loss.backward()
        total += loss.detach()
    return total


def pairs_in_one_batch(model: ScalarModel, group: list[Encoded]) -> torch.Tensor:
    chosen, rejected = model.score(collate_pairs(list(combinations(group, 2)))).chunk(2)
    loss = pairwise(chosen, rejected).mean()
    loss.backward()
    return loss.detach()


WAYS: dict[str, Callable[[ScalarModel, list[Encoded]], torch.Tensor]] = {
    "pairs one by one": pairs_one_by_one,
    "pairs in one batch": pairs_in_one_batch,
    "one forward": in_one_forward,
}


def seconds(model: ScalarModel, group: list[Encoded], way: str, repeats: int) -> tuple[float, float, torch.Tensor]:
    """Median seconds of a step, its loss, and the gradient of all weights as one vector."""
    taken, loss = [], torch.zeros(())
    for _ in range(repeats + 1):
        model.zero_grad()
        started = time.perf_counter()
        loss = WAYS[way](model, group)
        taken.append(time.perf_counter() - started)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return statistics.median(taken[1:]), float(loss), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_scalar(story_model(), device="cpu")
    torch.nn.init.normal_(model.output.weight, std=0.1)
    rows = []
    for k in args.answers:
        group = answers(k, args.prompt, args.response, model.model.config.vocab_size)
        found = {way: seconds(model, group, way, args.repeats) for way in WAYS}
        one = found["one forward"]
        for way, (taken, loss, gradient) in found.items():
            gap = float((gradient - one[2]).abs().max() / one[2].abs().max())
            rows.append({"K": k, "way": way, "ms": 1000 * taken, "loss": loss, "gradient_gap": gap,
                         "times_slower": taken / one[0]})  # fmt: skip
            print(
                f"K {k:2d}  {way:20s} {1000 * taken:8.1f} ms  {taken / one[0]:5.2f}x  loss {loss:.6f}  gap {gap:.1e}"
            )
    if args.record:
        about = {
            "date": str(date.today()),
            "machine": f"{platform.machine()} CPU, 1 thread",
            "torch": torch.__version__,
            "prompt_tokens": args.prompt,
            "response_tokens": args.response,
        }
        path = ROOT / "docs" / "results" / "ranking.json"
        path.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
