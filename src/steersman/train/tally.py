"""Running sums over micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from steersman.distributed.ranks import ranks
from steersman.types import Stats


@dataclass(slots=True)
class Tally:
    """Sums and counts by name, kept on the device until `means`: nothing waits for the accelerator in a loop."""

    sums: dict[str, Tensor | float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        """`total` is the sum over `count` things; the mean is reported."""
        total = total.detach() if isinstance(total, Tensor) else total
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self) -> Stats:
        """The mean of each name over all ranks, the same on every one."""
        totals: dict[str, float] = {}
        counts: dict[str, float] = {}
        sums = numbers(self.sums)
        for found in ranks().gather({name: (x, self.counts[name]) for name, x in sums.items()}, "means"):
            for name, (total, count) in found.items():
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0.0) + count
        return {name: total / max(counts[name], 1e-12) for name, total in totals.items()}


def numbers(named: dict[str, Tensor | float]) -> dict[str, float]:
    """The numbers by name; those on an accelerator are read all at once, so that it is waited for once."""
    there = {name: x.detach().double() for name, x in named.items() if isinstance(x, Tensor) and not x.is_cpu}
    read = dict(zip(there, torch.stack([*there.values()]).tolist(), strict=True)) if there else {}
    return {name: read[name] if name in read else float(x) for name, x in named.items()}
