"""The least time that the work can take on this machine: operations at its rate, bytes at its bandwidth.

    floor = sum over phases of max(FLOPs / measured matrix-multiply rate, bytes / measured memory bandwidth)

Counted is what the algorithm must do, with every prompt that several rows share read once and no padding; not
counted are norms, activations, rotations and the optimiser's arithmetic, which are small beside them.

    python benchmarks/floor.py      prints the rates of this machine and the floor of every scenario
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from common import HEADS, NEW, PROMPT, SHAPES

from steersman.jsonl import read_jsonl
from steersman.ops.products import linear


class Phase(NamedTuple):
    """What a phase must compute and move."""

    name: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """FLOPs and bytes per second, the best of several."""

    flops: float
    bandwidth: float

    def seconds(self, phases: Sequence[Phase]) -> dict[str, float]:
        """The floor of each named phase."""
        out: dict[str, float] = {}
        for phase in phases:
            out[phase.name] = out.get(phase.name, 0.0) + max(phase.flops / self.flops, phase.bytes / self.bandwidth)
        return out


def measure(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Rates:
    """Square products of 2,048 (8,192 on an accelerator), and copies of 256 MiB (2 GiB)."""
    on_gpu = device != "cpu"
    n, size = (8192, 1 << 29) if on_gpu else (2048, 1 << 26)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    ways = [lambda: torch.mm(a, b, out=out), lambda: linear(a, b)]  # the second is oneDNN's where that is faster
    product = min(_timed(way, device) for _ in range(8) for way in ways)
    x = torch.empty(size, device=device)
    y = torch.ones_like(x)
    copy = min(_timed(lambda: x.copy_(y), device) for _ in range(5))
    return Rates(2 * n**3 / product, 2 * x.numel() * x.element_size() / copy)


def _timed(run, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one Llama-style model; `size` is bytes per number."""

    hidden: int
    layers: int
    inner: int
    vocab: int
    size: int = 4

    @property
    def trunk(self) -> int:
        """Weights of the layers' matrices."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    def forward(self, rows: Sequence[tuple[int, int]], headed: int = 0, read: int | None = None) -> float:
        """FLOPs of rows of (new tokens, tokens before them); `headed` tokens go through the output layer.

        2 per weight and token; attention over n new tokens behind m: 4 H (n m + n^2 / 2) per layer. The last layer's
        feed-forward part is needed only for the states that are read, those before the output layer or `read`.
        """
        tokens = sum(n for n, _ in rows)
        attention = 4 * self.hidden * self.layers * sum(n * m + n * n / 2 for n, m in rows)
        unread = 2 * 3 * self.hidden * self.inner * (tokens - (headed if read is None else read))
        return 2 * self.trunk * tokens - unread + attention + 2 * self.head * headed

    def run(
        self,
        name: str,
        rows: Sequence[tuple[int, int]],
        headed: int = 0,
        *,
        read: int | None = None,
        trained: bool = False,
    ) -> Phase:
        """One pass: forward, or forward and backward (three times the forward)."""
        passes = 3 if trained else 1
        weights = (self.trunk + (self.head if headed else 0)) * self.size
        return Phase(name, passes * self.forward(rows, headed, read), passes * weights)

    def decode(self, name: str, rows: int, prompt: int, new: int) -> list[Phase]:
        """Each step reads all weights and all keys and values so far."""
        step = []
        for t in range(1, new):
            flops = self.forward([(1, prompt + t)] * rows, rows)
            memory = 2 * rows * (prompt + t) * self.hidden * self.layers
            step.append(Phase(name, flops, (self.trunk + self.head + memory) * self.size))
        return step

    def adamw(self, name: str, head: bool) -> Phase:
        """Reads weight, gradient and both moments, writes weight and moments; clipping reads the gradient once
        more and writes it."""
        weights = self.trunk + (2 * self.head if head else self.head)
        return Phase(name, 0.0, 9 * weights * self.size)


def on_policy(work: Work, scenario: str, prompts: int, samples: int) -> list[Phase]:
    """PPO with critic, reward model and reference, or GRPO with a reference."""
    rows = prompts * samples
    shared = [(PROMPT, 0)] * prompts + [(NEW, PROMPT)] * rows
    phases = [work.run("rollout", [(PROMPT, 0)] * prompts, rows), *work.decode("rollout", rows, PROMPT, NEW)]
    phases.append(work.run("score", shared, rows * NEW))
    if scenario == "ppo":
        # with one update per iteration the critic's values and its gradient are one pass, done while scoring
        phases += [work.run("reward", shared, read=rows), work.run("score", shared, read=rows * NEW, trained=True)]
    phases += [work.run("update", shared, rows * NEW, trained=True), work.adamw("update", True)]
    if scenario == "ppo":
        phases.append(work.adamw("update", False))
    return phases


def offline(work: Work, scenario: str, folder: Path, steps: int, batch: int = 16) -> list[Phase]:
    """DPO with its reference, a reward model, or SFT: one epoch over the first rows of the data."""
    phases = []
    file = "sft" if scenario == "sft" else "pairs"
    lines = read_jsonl(folder / f"{file}.jsonl")[: steps * batch]
    rows, headed, ends = [], 0, 0
    for line in lines:
        prompt = len(line["prompt"].split())
        answers = [len(line[k].split()) + 1 for k in ("chosen", "rejected", "completion") if k in line]
        rows += [(prompt, 0)] + [(n, prompt) for n in answers]
        headed += sum(answers)
        ends += len(answers)
    told, read = (0, ends) if scenario == "reward" else (headed, headed)
    one = work.run("steps", rows, told, read=read, trained=True)
    phases.append(Phase("steps", one.flops, one.bytes * steps))
    phases += [work.adamw("steps", scenario != "reward")] * steps
    if scenario == "dpo":
        phases.append(work.run("reference", rows, headed))
    return phases


def work_of(shape: str, dtype: str = "float32") -> Work:
    return Work(**SHAPES[shape], size=getattr(torch, dtype).itemsize)


def main() -> None:
    torch.set_num_threads(2)
    rates = measure()
    print(f"{rates.flops / 1e9:.0f} GFLOP/s, {rates.bandwidth / 1e9:.0f} GB/s; heads: {HEADS}")
    for shape in ("llama5m", "llama36m"):
        for scenario, prompts, samples in (("ppo", 64, 1), ("grpo", 8, 8)):
            phases = on_policy(work_of(shape), scenario, prompts, samples)
            floor = rates.seconds(phases)
            told = ", ".join(f"{name} {s:.2f}" for name, s in floor.items())
            print(f"{shape} {scenario}: {sum(p.flops for p in phases) / 1e9:.0f} GFLOP, floor {told} s")


if __name__ == "__main__":
    main()
