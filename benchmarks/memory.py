"""Peak memory of log-probabilities over 128,000 words, forward and backward: fused in tiles beside plain logits.

    python benchmarks/memory.py [--tokens 2048] [--hidden 256] [--vocab 128000] [--device cpu]

Each in a process of its own; what is counted is the peak above what stood there before (weights and states); the
gradient of the weights, 131 MB, is part of it on both sides. The
peaks of whole iterations stand in the other scripts' results.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import peak_mib
from duel import about, parser, write

from steersman.ops.logprob import linear_logp


def run(way: str, tokens: int, hidden: int, vocab: int, device: str, threads: int) -> dict[str, float]:
    """Seconds and peak MiB above the start of one forward and backward pass."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weight = (torch.randn(vocab, hidden, device=device) / hidden**0.5).requires_grad_()
    states = torch.randn(tokens, hidden, device=device, requires_grad=True)
    target = torch.randint(vocab, (tokens,), device=device)
    before = resident_mib() if device == "cpu" else torch.cuda.memory_allocated() / 2**20
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    if way == "fused":
        logp = linear_logp(states, weight, None, target)[0]
    else:
        logits = (states @ weight.T).float()
        logp = torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
    logp.mean().backward()
    total = float(logp.detach().mean())
    seconds = time.perf_counter() - start
    peak = peak_mib() if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": seconds, "peak_mib": peak - before, "mean_logp": total}


def resident_mib() -> float:
    """What this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    given = parser(__doc__ or "", [])
    given.add_argument("--tokens", type=int, default=2048)
    given.add_argument("--hidden", type=int, default=256)
    given.add_argument("--vocab", type=int, default=128_000)
    given.add_argument("--way", choices=["fused", "plain"])
    args = given.parse_args()
    if args.way:
        print(json.dumps(run(args.way, args.tokens, args.hidden, args.vocab, args.device, args.threads)))
        return
    found = {}
    for way in ("fused", "plain"):
        out = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True, text=True, check=True)
        found[way] = json.loads(out.stdout)
    ratio = found["fused"]["peak_mib"] / found["plain"]["peak_mib"]
    assert abs(found["fused"]["mean_logp"] - found["plain"]["mean_logp"]) < 1e-3
    sizes = {"tokens": args.tokens, "hidden": args.hidden, "vocab": args.vocab}
    told = ", ".join(f"{way} {f['peak_mib']:.0f} MiB {f['seconds']:.2f} s" for way, f in found.items())
    print(f"log-probabilities at {args.vocab:,} words: {told}; {ratio:.2f} of the plain memory")
    print(write(args, "memory", {**about(args, {}), **sizes, **found, "share": ratio}))


if __name__ == "__main__":
    main()
