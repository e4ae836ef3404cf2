"""Controllers of a KL coefficient. Each has `coef`, `update(kl)` and a state that a checkpoint keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from steersman.algorithms.base import Algorithm, Coefficients
from steersman.types import Stats


@dataclass
class FixedKL:
    """The coefficient stays what it is."""

    coef: float

    def update(self, kl: float) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.coef = state["coef"]


@dataclass
class ProportionalKL(FixedKL):
    """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon.

    `kl` is per response in nats, `horizon` in samples. Source: arXiv 1909.08593, section 2.2 (there the update is
    per batch with gain 0.1; the horizon form is that of its code).
    """

    target: float
    horizon: float
    samples: int

    def update(self, kl: float) -> None:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * self.samples / self.horizon


@dataclass
class DoublingKL(FixedKL):
    """Halve below target / 1.5, double above target * 1.5, with `kl` to the policy that sampled.

    Source: adaptive KL penalty of PPO, arXiv 1707.06347, section 4.
    """

    target: float

    def update(self, kl: float) -> None:
        if kl < self.target / 1.5:
            self.coef /= 2
        elif kl > self.target * 1.5:
            self.coef *= 2


class KLCoefficients:
    """Both coefficients of a method: `beta` on KL to the reference, `beta_old` on KL to the sampler.

    `samples` is how many responses an iteration has.
    """

    def __init__(self, algorithm: Algorithm, samples: int) -> None:
        target, asked = algorithm.kl_target, algorithm.kl_to_sampler()
        self.beta = (
            FixedKL(algorithm.beta)
            if target is None
            else ProportionalKL(algorithm.beta, target, algorithm.kl_horizon, samples)
        )
        self.beta_old = FixedKL(0.0) if asked is None else DoublingKL(*asked)

    def current(self) -> Coefficients:
        return Coefficients(self.beta.coef, self.beta_old.coef)

    def adapt(self, stats: Stats, *, actor: bool = True) -> None:
        """Lets each controller see an iteration's `kl` and `kl/old`, if they were measured and the actor learned."""
        if "kl" in stats and actor:
            self.beta.update(stats["kl"])
        if "kl/old" in stats and actor:
            self.beta_old.update(stats["kl/old"])

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta.state_dict(), "beta_old": self.beta_old.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.beta.load_state_dict(state["beta"])
        self.beta_old.load_state_dict(state["beta_old"])
