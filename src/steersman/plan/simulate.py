"""How a loop's seconds grow and shrink from one device to thousands, with responses that end at different times.

A discrete simulation. Each device that samples has its share of an iteration's responses: as many as fit its memory
(and where no devices are apart, at most `rollout.max_batch`) are decoded side by side, one token each a step, and
when one ends the next takes its place, as the engine does. A step reads the weights once and every live row's cache.
Training waits for the last response of its iteration, and sampling for weights that are at most `ahead` updates old:

    begin of batch j on device d = max(its end of batch j - 1, end of update j - 1 - ahead + moving the weights)
    begin of update j            = max(end of update j - 1, the last device's end of batch j)

With no devices apart all of them sample, then all of them train. Collectives take their bytes over the slowest link,
and `HOP` seconds for each doubling of the devices.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace

import numpy as np

from steersman.plan.costs import MBU, MFU, seconds
from steersman.plan.devices import Cluster
from steersman.plan.layouts import Layout, Role, Work

HOP = 10e-6
"""Seconds until a message is at another device, in a collective: NCCL's small messages take 5 to 20 microseconds."""
ROOM = 0.9
"""Share of a device's memory that sampling may fill."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of responses in tokens: log-normal, cut at `longest`. `spread` is the deviation over the mean, before
    the cut; the published lengths of reasoning models lie about 0.5 to 1."""

    mean: float
    longest: int
    spread: float = 0.7

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        variance = math.log(1 + self.spread**2)
        drawn = rng.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), count)
        return np.clip(np.rint(drawn), 1, self.longest).astype(np.int64)


@dataclass(frozen=True, slots=True)
class SimulatedIteration:
    """Seconds of an iteration, and the shares of them in which a device of its kind waits for others."""

    devices: int
    apart: int
    ahead: int
    seconds: float
    samplers_wait: float
    trainers_wait: float


def simulate(
    there: Cluster, roles: list[Role], work: Work, lengths: Lengths, *, apart: int = 0, ahead: int = 0,
    iterations: int = 12, seed: int = 0,
) -> SimulatedIteration:  # fmt: skip
    """`iterations` of the loop, the first third left out; `apart` of the devices sample, the others train (0: all do
    both, and `ahead` is 0)."""
    n, rng = there.count, np.random.default_rng(seed)
    samplers = apart or n
    if apart:  # these run vLLM
        work = replace(work, max_batch=None)
    train, move = phases(there, roles, work, lengths, apart)
    ended, updated = np.zeros(samplers), [0.0] * (ahead + 1)
    busy_sampling = 0.0
    marks = []
    for _ in range(iterations):
        drawn = lengths.draw(work.samples, rng)
        shares = [drawn[d::samplers] for d in range(samplers)]
        took = np.array([decode(share, there, roles[0], work) for share in shares])
        began = np.maximum(ended, updated[-1 - ahead] + move)
        if not apart:
            began = np.full(samplers, updated[-1] + move)
        ended = began + took
        busy_sampling += took.mean()
        updated.append(max(updated[-1], ended.max()) + train)
        marks.append((updated[-1], busy_sampling))
    first, last = marks[iterations // 3 - 1], marks[-1]
    count = iterations - iterations // 3
    each, sampling = (last[0] - first[0]) / count, (last[1] - first[1]) / count
    trains = each - train if apart else each - train - sampling
    return SimulatedIteration(
        n, apart, ahead, each, max(1 - (sampling if apart else sampling + train) / each, 0), trains / each
    )


def decode(share: np.ndarray, there: Cluster, role: Role, work: Work) -> float:
    """Seconds in which a device decodes responses of these lengths, and reads their prompts before."""
    if not len(share):
        return 0.0
    device, shape = there.device, role.shape
    weights = shape.parameters * work.compute
    longest = shape.cache(work.prompt + int(share.max()), work.compute)
    rows = max(1, min(len(share), work.max_batch or len(share), int((device.memory * ROOM - weights) / longest)))
    free = [0] * rows
    begin = np.empty(len(share), dtype=np.int64)
    for i, tokens in enumerate(share):  # the next response takes the place that is free first
        begin[i] = at = heapq.heappop(free)
        heapq.heappush(free, at + int(tokens))
    ends = begin + share
    steps = np.unique(np.concatenate([begin, ends]))
    live = np.searchsorted(np.sort(begin), steps[:-1], "right") - np.searchsorted(np.sort(ends), steps[:-1], "right")
    read = weights + live * shape.cache(work.prompt + share.mean() / 2, work.compute)
    step = np.maximum(
        read / (device.bandwidth * MBU),
        2 * shape.active * live / (device.flops * MFU),
    )
    prefill = 2 * shape.active * len(share) * work.prompt / (device.flops * MFU)
    return float(prefill + (np.diff(steps) * step).sum())


def phases(there: Cluster, roles: list[Role], work: Work, lengths: Lengths, apart: int) -> tuple[float, float]:
    """Seconds of scoring and training together, and of moving the weights, with collectives' hops."""
    n = there.count - apart
    inside = min(n, there.per_node)
    layout = Layout("", inside if n > 1 else 1, apart)
    found = seconds(layout, roles, replace(work, new=round(lengths.mean)), there)
    micro = max(1, round(work.epochs * work.samples * (work.prompt + lengths.mean) / n / work.micro))
    hops = 3 * sum(r.shape.layers for r in roles if r.trained) * micro * math.log2(max(inside, 1)) * HOP
    copies = 2 * math.log2(max(n / inside, 1)) * HOP * work.epochs
    move = found.get("move weights", 0.0) + math.log2(max(there.count, 1)) * HOP * roles[0].shape.layers
    return found.get("score", 0.0) + found["train"] + found.get("exchange", 0.0) + hops + copies, move


def best_apart(
    there: Cluster, roles: list[Role], work: Work, lengths: Lengths, ahead: int, *, iterations: int = 6
) -> SimulatedIteration | None:
    """The fastest of the ways to set one to seven eighths of the devices apart; None where there are too few."""
    tried = {round(there.count * part / 8) for part in range(1, 8)} - {0, there.count}
    found = [
        simulate(there, roles, work, lengths, apart=apart, ahead=ahead, iterations=iterations) for apart in tried
    ]
    return min(found, key=lambda one: one.seconds, default=None)
