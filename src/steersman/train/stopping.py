"""When a run ends before its time: a held-out judge no longer finds it better, or its budget of KL is spent."""

from __future__ import annotations

import math

from steersman.recipe.stopping import StopConfig


class Stopping:
    """The looks so far, the start's first, and whether the run should end."""

    def __init__(self, config: StopConfig | None) -> None:
        self.config = config
        self.values: list[float] = []

    def add(self, value: float, kl: float) -> None:
        """A look: the judge's mean, and KL in nats per response."""
        spent = self.config is not None and self.config.max_kl is not None and kl > self.config.max_kl
        self.values.append(-math.inf if spent else value)

    @property
    def best(self) -> int:
        """The place of the best look, the earliest of equals; the last look where nothing was asked for."""
        if self.config is None:
            return len(self.values) - 1
        return max(range(len(self.values)), key=lambda i: (self.values[i], -i))

    @property
    def reason(self) -> str | None:
        """Why the run should end now; None where it should go on."""
        if self.config is None or not self.values:
            return None
        if self.values[-1] == -math.inf:
            return f"KL is beyond the budget of {self.config.max_kl:g} nats"
        since = len(self.values) - 1 - self.best
        if since >= self.config.patience:
            return f"{self.config.judge} has found nothing better for {since} looks"
        return None
