"""Controllers of a KL coefficient. Each has `coef`, `update(kl)` and a state that a checkpoint keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass


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


def kl_to_sampler_controller(asked: tuple[float, float] | None) -> FixedKL:
    """What moves the coefficient of KL(old || new): by the method's first coefficient and target, else 0 for good."""
    return FixedKL(0.0) if asked is None else DoublingKL(*asked)
