"""Running sums over micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from steersman.run.ranks import ranks
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
        for found in ranks().gather({name: (float(x), self.counts[name]) for name, x in self.sums.items()}, "means"):
            for name, (total, count) in found.items():
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0.0) + count
        return {name: total / max(counts[name], 1e-12) for name, total in totals.items()}
